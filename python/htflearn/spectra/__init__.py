"""The spectra of a model's matricizations: measured, shown in a table, drawn on the mode tree."""
