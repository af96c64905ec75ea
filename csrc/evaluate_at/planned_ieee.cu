#include "evaluate_at/gather_backward.cuh"

namespace htf::gpu::planned {
template void launch_forward<Mode::ieee>(const Current&, int64_t, int, const Jobs<ForwardJob>&);
template void launch_products<Mode::ieee>(const Current&, int64_t, int, const Jobs<ProductJob>&);
template void launch_segments<Mode::ieee>(const Current&, int, const Jobs<SegmentJob>&);
}  // namespace htf::gpu::planned
