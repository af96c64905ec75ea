// A schedule's launches, and the operators
//
//   evaluate_at_planned(weights, schedule, lists) -> [result, frames]
//   evaluate_at_planned_backward(grad, weights, frames, schedule, lists, needs, squares)
//     -> gradients, and with `squares` the partial sums of their squares behind them
#include "evaluate_at/planned_cuda.h"

#include "evaluate_at/planned_cuda_jobs.h"

namespace htf::gpu {
namespace planned {
namespace {

const PlannedHeader& header_of(const int64_t* schedule) {
  return *reinterpret_cast<const PlannedHeader*>(schedule);
}

template <class Record>
constexpr int64_t kNumbers = static_cast<int64_t>(sizeof(Record) / sizeof(int64_t));

// Reads a schedule from front to back.
class Reader {
 public:
  explicit Reader(const int64_t* schedule) : at_(schedule + kPlannedHeader) {}
  template <class Record>
  const Record& next() {
    const Record& record = *reinterpret_cast<const Record*>(at_);
    at_ += kNumbers<Record>;
    return record;
  }

 private:
  const int64_t* at_;
};

int64_t blocks_over(int64_t n, int64_t each) { return (n + each - 1) / each; }
int64_t tiles_of(int64_t rows, int64_t cols, int64_t config) {
  const TileSize tile = tile_size(config);
  return blocks_over(rows, tile.rows) * blocks_over(cols, tile.cols);
}
// Kernels go a little further than the last row before they look.
int narrow(int64_t n) {
  check(n >= 0 && n <= INT32_MAX - 65536, "evaluate_at_planned: ", n,
        " rows, columns or blocks are too many");
  return static_cast<int>(n);
}

// What is resolved: where everything is in this call.
struct Places {
  const PlannedCall* call = nullptr;
  const void* in = nullptr;  // grad
  void* out = nullptr;       // result
  void* const* gradients = nullptr;

  void* at(const Address& a) const {
    if (a.space == kNowhere) return nullptr;
    if (a.space >= kGradientSpace) return moved(gradients[a.space - kGradientSpace], a.offset);
    if (a.space >= kWeightSpace)
      return moved(const_cast<void*>(call->weights[a.space - kWeightSpace]), a.offset);
    if (a.space == kFrames) return moved(call->frames, a.offset);
    if (a.space == kWorkspace) return moved(call->workspace, a.offset);
    return moved(a.space == kResult ? out : const_cast<void*>(in), a.offset);
  }
  const int32_t* list(int64_t at) const { return at < 0 ? nullptr : call->lists + at; }
  Operand operand(const OperandRecord& r) const { return {at(r.frame), list(r.ids)}; }

 private:
  static void* moved(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
};

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  return true;
}

// Fills a job; the number of its blocks. With `places` null only the latter.
template <class S>
int64_t fill(const ForwardRecord& r, int64_t config, const Places* places, ForwardJob& job) {
  constexpr int V = 16 / sizeof(S);
  int64_t blocks = 0, across = 0;
  if (r.kind == ForwardJob::kProduct) {
    across = blocks_over(r.cols, tile_size(config).cols);
    blocks = tiles_of(r.rows, r.cols, config);
  } else if (r.kind == ForwardJob::kDot) {
    for (across = 1; across < 32 && across * V < r.width;) across *= 2;
    blocks = blocks_over(r.rows, kPlannedThreads / across);
  } else {
    across = blocks_over(r.width, V);
    blocks = blocks_over(r.rows * across, int64_t{4} * kPlannedThreads);
  }
  if (places == nullptr) return blocks;
  job.kind = static_cast<int>(r.kind), job.count = static_cast<int>(r.count);
  job.rows = narrow(r.rows), job.width = narrow(r.width), job.cols = narrow(r.cols);
  job.across = narrow(across);
  job.weight = places->at(r.weight);
  job.out = places->at(r.out);
  job.aligned_k = r.width % V == 0;
  for (int o = 0; o < kOperands; ++o) {
    job.operand[o] = places->operand(r.operand[o]);
    job.aligned_k = job.aligned_k && aligned({job.operand[o].frame});
  }
  const int64_t along = r.kind == ForwardJob::kProduct ? r.cols : r.width;
  job.aligned_n = along % V == 0 && aligned({job.weight});
  return blocks;
}

template <class S>
int64_t fill(const ProductRecord& r, int64_t config, const Places* places, ProductJob& job) {
  constexpr int V = 16 / sizeof(S);
  const bool rows = r.kind == ProductJob::kRows;
  const int64_t used = rows ? config : int64_t{tile_of_weights(config)};
  const int64_t tiles = tiles_of(rows ? r.rows : r.width, rows ? r.width : r.cols, used);
  const int64_t blocks = tiles * (rows ? 1 : std::max<int64_t>(1, blocks_over(r.rows, r.each)));
  if (places == nullptr) return blocks;
  job.kind = static_cast<int>(r.kind), job.count = static_cast<int>(r.count);
  job.rows = narrow(r.rows), job.width = narrow(r.width), job.cols = narrow(r.cols);
  job.across = narrow(blocks_over(rows ? r.width : r.cols, tile_size(used).cols));
  job.tiles = narrow(tiles), job.each = narrow(r.each);
  job.parts = r.parts != 0, job.final = r.final != 0;
  job.weight = places->at(r.weight), job.grad = places->at(r.grad), job.out = places->at(r.out);
  job.aligned_k = r.width % V == 0;
  for (int o = 0; o < kOperands; ++o) {
    job.operand[o] = places->operand(r.operand[o]);
    job.aligned_k = job.aligned_k && aligned({job.operand[o].frame});
  }
  job.aligned_n = r.cols % V == 0 && aligned({job.weight, job.grad});
  return blocks;
}

template <class S>
int64_t fill(const SegmentRecord& r, int64_t, const Places* places, SegmentJob& job) {
  constexpr int V = 16 / sizeof(S);
  const int64_t together = kPlannedThreads >> (r.lane_bits + r.group_bits);
  const int64_t chunks = blocks_over(r.width, V << r.lane_bits);
  const int64_t blocks = blocks_over(r.segments, together * r.repeats);
  if (places == nullptr) return r.splits * blocks * chunks;
  job.source = static_cast<int>(r.source), job.count = static_cast<int>(r.count);
  job.segments = narrow(r.segments), job.width = narrow(r.width), job.rows = narrow(r.rows);
  job.lane_bits = static_cast<int>(r.lane_bits), job.group_bits = static_cast<int>(r.group_bits);
  job.repeats = narrow(r.repeats), job.splits = narrow(r.splits);
  narrow(blocks * together * r.repeats);  // up to where the last block looks
  job.blocks = narrow(blocks), job.chunks = narrow(chunks);
  job.parts = r.parts != 0, job.final = r.final != 0;
  job.start = places->list(r.start), job.order = places->list(r.order);
  job.grad = places->at(r.grad), job.weight = places->at(r.weight), job.own = places->at(r.own);
  job.weight_parts = places->at(r.weight_parts), job.out = places->at(r.out);
  job.aligned = r.width % V == 0 && aligned({job.grad, job.weight, job.own});
  if (r.source == SegmentJob::kColumn)
    job.aligned = r.width % V == 0 && aligned({job.weight, job.own});
  for (int o = 0; o < kOperands - 1; ++o) {
    job.other[o] = places->operand(r.other[o]);
    job.aligned = job.aligned && aligned({job.other[o].frame});
  }
  return r.splits * blocks * chunks;
}

// Counts, and with a device also launches, the launches of a schedule.
template <Mode mode>
class Runner {
 public:
  using S = typename Numbers<mode>::S;

  Runner(const Current* current, const Places* places, double* squares)
      : current_(current), places_(places), squares_(squares) {}

  void run(Reader& reader, int64_t launches) {
    for (int64_t i = 0; i < launches; ++i) {
      const auto& record = reader.next<LaunchRecord>();
      if (record.kind == kForward)
        jobs<ForwardRecord, ForwardJob>(reader, record);
      else if (record.kind == kProducts)
        jobs<ProductRecord, ProductJob>(reader, record);
      else
        jobs<SegmentRecord, SegmentJob>(reader, record);
    }
  }

  int64_t launches = 0, blocks = 0;

 private:
  template <class Record, class Job>
  void jobs(Reader& reader, const LaunchRecord& record) {
    Jobs<Job> all;
    int64_t here = 0;
    const auto flush = [&] {
      if (here > 0) {
        if (current_ != nullptr) {
          all.squares = squares_ == nullptr ? nullptr : squares_ + blocks;
          send(record, narrow(here), all);
        }
        ++launches, blocks += here;
      }
      all.count = 0, here = 0;
    };
    for (int64_t q = 0; q < record.jobs; ++q) {
      const auto& r = reader.next<Record>();
      Job& job = all.job[all.count];
      const int64_t its = fill<S>(r, record.config, places_, job);
      if (its == 0) continue;
      job.first = narrow(here);
      here += its;
      if (++all.count == Jobs<Job>::kMost) flush();
    }
    flush();
  }
  void send(const LaunchRecord& r, int blocks, const Jobs<ForwardJob>& all) const {
    launch_forward<mode>(*current_, r.config, blocks, all);
  }
  void send(const LaunchRecord& r, int blocks, const Jobs<ProductJob>& all) const {
    launch_products<mode>(*current_, r.config, blocks, all);
  }
  void send(const LaunchRecord&, int blocks, const Jobs<SegmentJob>& all) const {
    launch_segments<mode>(*current_, blocks, all);
  }

  const Current* current_;
  const Places* places_;
  double* squares_;
};

template <class Do>
auto with_mode(int64_t mode, Do&& run) {
  switch (static_cast<Mode>(mode)) {
    case Mode::ieee:
      return run(std::integral_constant<Mode, Mode::ieee>{});
    case Mode::tf32:
      return run(std::integral_constant<Mode, Mode::tf32>{});
    case Mode::tf32x3:
      return run(std::integral_constant<Mode, Mode::tf32x3>{});
    case Mode::bf16:
      return run(std::integral_constant<Mode, Mode::bf16>{});
    default:
      return run(std::integral_constant<Mode, Mode::f64>{});
  }
}

// Past the forward launches.
void skip(Reader& reader, int64_t launches) {
  for (int64_t i = 0; i < launches; ++i)
    for (int64_t jobs = reader.next<LaunchRecord>().jobs; jobs > 0; --jobs)
      reader.next<ForwardRecord>();
}

}  // namespace
}  // namespace planned

using namespace planned;

PlannedSizes planned_sizes(const int64_t* schedule, int64_t length) {
  check(length >= kPlannedHeader && header_of(schedule).version == kPlannedVersion &&
            header_of(schedule).length == length &&
            header_of(schedule).needed + header_of(schedule).groups == length &&
            header_of(schedule).mode >= 0 &&
            header_of(schedule).mode <= static_cast<int64_t>(Mode::f64),
        "evaluate_at_planned: the schedule is not of this version of htfkernels");
  const PlannedHeader& h = header_of(schedule);
  PlannedSizes sizes;
  sizes.groups = h.groups, sizes.batch = h.batch, sizes.outputs = h.outputs;
  sizes.frame_elements = h.frame_elements, sizes.workspace_bytes = h.workspace_bytes;
  const Mode mode = static_cast<Mode>(h.mode);
  sizes.dtype = mode == Mode::f64    ? ScalarType::Double
                : mode == Mode::bf16 ? ScalarType::BFloat16
                                     : ScalarType::Float;
  with_mode(h.mode, [&](auto m) {
    Reader reader(schedule);
    Runner<m> forward(nullptr, nullptr, nullptr), backward(nullptr, nullptr, nullptr);
    forward.run(reader, h.forward);
    backward.run(reader, h.backward);
    sizes.forward_launches = forward.launches, sizes.backward_launches = backward.launches;
    sizes.squares = backward.blocks;
  });
  return sizes;
}

void planned_forward(const Current& current, const PlannedCall& call, void* result) {
  const PlannedHeader& h = header_of(call.schedule);
  Places places;
  places.call = &call, places.out = result;
  with_mode(h.mode, [&](auto m) {
    Reader reader(call.schedule);
    Runner<m>(&current, &places, nullptr).run(reader, h.forward);
  });
}

void planned_backward(const Current& current, const PlannedCall& call, const void* grad,
                      void* const* gradients, double* squares) {
  const PlannedHeader& h = header_of(call.schedule);
  Places places;
  places.call = &call, places.in = grad, places.gradients = gradients;
  with_mode(h.mode, [&](auto m) {
    Reader reader(call.schedule);
    skip(reader, h.forward);
    Runner<m>(&current, &places, squares).run(reader, h.backward);
  });
}

namespace {

struct Arguments {
  const int64_t* schedule;
  PlannedSizes sizes;
  std::vector<const void*> weights;

  Arguments(const char* op, const std::vector<Tensor>& given, const Tensor& made,
            const Tensor& lists) {
    check(made.is_cpu() && made.scalar_type() == ScalarType::Long && made.dim() == 1 &&
              made.is_contiguous(),
          op, ": schedule must be a contiguous int64 CPU tensor, got ", describe(made));
    schedule = made.const_data_ptr<int64_t>();
    sizes = planned_sizes(schedule, made.numel());
    check(static_cast<int64_t>(given.size()) == sizes.groups, op, ": expected ", sizes.groups,
          " folded weights, got ", given.size());
    for (const Tensor& w : given) {
      check(on_device(w) && w.scalar_type() == sizes.dtype && w.dim() == 3 && w.is_contiguous(), op,
            ": weights must be contiguous [F, R_in, R_out] of dtype ", toString(sizes.dtype),
            " on the device, got ", describe(w));
      weights.push_back(w.const_data_ptr());
    }
    check(on_device(lists) && lists.scalar_type() == ScalarType::Int && lists.dim() == 1 &&
              lists.is_contiguous(),
          op, ": lists must be contiguous int32 on the device, got ", describe(lists));
  }
};

std::vector<Tensor> evaluate(const std::vector<Tensor>& weights, const Tensor& schedule,
                             const Tensor& lists) {
  const Arguments args("evaluate_at_planned", weights, schedule, lists);
  const Current current(weights[0]);
  const PlannedSizes& n = args.sizes;
  std::vector<int64_t> shape{n.batch};
  if (n.outputs > 1) shape.push_back(n.outputs);
  Tensor result = device_tensor(current, weights[0], shape, n.dtype);
  Tensor frames = device_tensor(current, weights[0], {n.frame_elements}, n.dtype);
  const PlannedCall call{args.schedule, args.weights.data(), lists.const_data_ptr<int32_t>(),
                         frames.mutable_data_ptr()};
  planned_forward(current, call, result.mutable_data_ptr());
  return {result, frames};
}

std::vector<Tensor> gradients(const Tensor& grad, const std::vector<Tensor>& weights,
                              const Tensor& frames, const Tensor& schedule, const Tensor& lists,
                              const std::vector<int64_t>& needs, bool squares) {
  const char* op = "evaluate_at_planned_backward";
  const Arguments args(op, weights, schedule, lists);
  const PlannedSizes& n = args.sizes;
  check(on_device(grad) && grad.scalar_type() == n.dtype && grad.is_contiguous() &&
            grad.numel() == n.batch * n.outputs,
        op, ": grad must be contiguous, of ", n.batch * n.outputs, " numbers of dtype ",
        toString(n.dtype), " on the device, got ", describe(grad));
  check(frames.scalar_type() == n.dtype && frames.numel() == n.frame_elements, op,
        ": kept must be what the forward operation returned, ", n.frame_elements, " numbers, got ",
        describe(frames));
  check(static_cast<int64_t>(needs.size()) == n.groups, op, ": needs must have ", n.groups,
        " entries, got ", needs.size());
  const int64_t* needed = args.schedule + header_of(args.schedule).needed;
  for (std::size_t g = 0; g < needs.size(); ++g)
    check((needs[g] != 0) == (needed[g] != 0), op, ": the schedule was made for other gradients");
  const Current current(weights[0]);
  const Tensor workspace =
      device_tensor(current, weights[0], {n.workspace_bytes}, ScalarType::Byte);
  std::vector<Tensor> made;
  std::vector<void*> pointers;
  for (std::size_t g = 0; g < weights.size(); ++g) {
    const Tensor& w = weights[g];
    std::vector<int64_t> shape{0};
    if (needs[g] != 0) shape = {w.size(0), w.size(1), w.size(2)};
    made.push_back(device_tensor(current, w, shape, n.dtype));
    pointers.push_back(needs[g] != 0 ? made.back().mutable_data_ptr() : nullptr);
  }
  const PlannedCall call{args.schedule, args.weights.data(), lists.const_data_ptr<int32_t>(),
                         const_cast<void*>(frames.const_data_ptr()), workspace.mutable_data_ptr()};
  double* sums = nullptr;
  if (squares) {
    made.push_back(device_tensor(current, weights[0], {n.squares}, ScalarType::Double));
    sums = static_cast<double*>(made.back().mutable_data_ptr());
  }
  planned_backward(current, call, grad.const_data_ptr(), pointers.data(), sums);
  return made;
}

}  // namespace
}  // namespace htf::gpu

HTF_CUDA_LIBRARY(m) {
  m.def("evaluate_at_planned(Tensor[] weights, Tensor schedule, Tensor lists) -> Tensor[]");
  m.def(
      "evaluate_at_planned_backward(Tensor grad, Tensor[] weights, Tensor frames, Tensor schedule, "
      "Tensor lists, int[] needs, bool squares) -> Tensor[]");
}
HTF_CUDA_KERNELS(m) {
  m.impl("evaluate_at_planned", TORCH_BOX(&htf::gpu::evaluate));
  m.impl("evaluate_at_planned_backward", TORCH_BOX(&htf::gpu::gradients));
}
