"""``python -m htfkernels``: the same as ``htf info``, without the learn extra."""

from htfkernels.info import info_text

if __name__ == "__main__":
    print(info_text())
