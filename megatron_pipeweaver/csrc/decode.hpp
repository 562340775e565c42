// Stage interleaving: priorities in, a schedule out (paper 4.2), with memory admission that cannot
// deadlock. `search/reference.py` does the same in plain Python, op for op.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "alone.hpp"
#include "model.hpp"

namespace pipeweaver {

inline constexpr i64 kNever = std::numeric_limits<i64>::max();

// What a decode obeys. Of what may start first, the least key goes first.
struct Policy {
  std::vector<i64> key;      // per op; of weight gradients it is read only when `split`
  std::vector<i32> level;    // per stage pair: the fastest level it may use
  std::vector<i64> load;     // per microbatch: what it counts for while in flight
  std::vector<i64> release;  // per microbatch: it does not start before (ns)
  i64 load_limit = kNever;   // no microbatch starts above it, unless none is in flight
  bool split = true;         // weight gradients are ops of their own
  bool alternate = false;    // forward and backward by turns where both could start (1F1B)
  bool adaptive = true;      // a forward in mid-chain takes a leaner level rather than wait
  bool in_order = false;     // each stage's backwards in the order of microbatches
  i64 patience = 0;          // 1/256ths of a weight gradient that a gap must have to hold it
  i64 hold = 0;              // an op may wait this long (ns) for one with a lesser key
};

struct Timetable {
  i64 makespan = 0;
  std::vector<std::vector<i32>> order;  // per rank: its ops
  std::vector<i64> start, end;          // per op
  std::vector<i32> level;               // per stage pair
  bool split = true;                    // weight gradients are ops of their own
};

// Reusable: holds the working memory of one thread.
class Decoder {
 public:
  Decoder(const Model& model, const std::vector<Alone>& alone);

  // Fills `out`; false only if nothing could go on, which the admission rules out.
  bool run(const Policy& policy, Timetable& out);

  i64 executed = 0;  // stage executions (forwards and backwards) since construction

 private:
  struct Ready {
    i64 arrive, key;
    i32 pair;
    i32 refused = -1;  // the rank's `freed` when it was not admitted last
  };
  struct Choice {
    i64 start = kNever, key = 0;
    i32 pair = -1, kind = -1, level = 0;
    i32 index = -1;  // in the rank's ready list of its kind; -1 for what is not in it
  };
  struct Rank {
    i64 free = 0, held = 0;
    i32 last_kind = -1;
    i32 freed = 0;  // grows whenever a forward that was refused may be admitted
    bool stale = true;
    std::vector<Ready> ready[2];               // forwards, backwards; by key, then stage pair
    std::vector<std::pair<i64, i32>> weights;  // heap: stage pairs whose weight gradient waits
    Choice forward, backward;  // the best of each kind; what enters counts as a forward
    Choice choice;
  };

  void reset();
  void choose(i32 rank);
  void offer(Rank& state, i32 kind, i32 index);
  void decide(Rank& state) const;
  void choose_entering(Choice& best);
  bool offer_entering(i32 pass, Choice& best);
  void choose_weight(const Rank& state, Choice& forward, Choice& backward) const;
  void choose_held(const Rank& state, Choice& best) const;
  i32 admit(i32 pair) const;
  bool safe(i32 rank, i32 microbatch, i64 bytes, i64 lean) const;
  bool step_open(i32 pair) const;
  bool order_open(i32 pair) const;
  void execute(i32 rank);
  void finish_forward(i32 pair, i64 end);
  void finish_backward(i32 pair, i64 end);
  void arrive(i32 pair, i32 kind, i64 time);
  void begin_microbatch(i32 microbatch);
  void release(i32 pair);
  void retire(i32 microbatch);
  bool relax();
  void all_stale();

  const Model& m_;
  const std::vector<Alone>& alone_;
  std::vector<i64> most_needed_;  // per rank: the largest peak of any microbatch alone

  const Policy* policy_ = nullptr;
  Timetable* out_ = nullptr;
  std::vector<Rank> ranks_;
  std::vector<i64> held_, need_;  // rank * microbatches + microbatch
  std::vector<i32> flight_;       // microbatches in flight, in the order in which they started
  std::vector<i32> place_;        // microbatch -> index in flight_, -1 when not in flight
  std::vector<char> relaxed_;     // per microbatch: may go down to its leanest levels
  std::vector<i32> ops_left_;     // per microbatch
  std::vector<i32> step_, step_forwards_, releases_;  // per microbatch that is not narrow
  std::vector<i32> forwards_wanted_, backwards_wanted_;
  std::vector<i64> forward_arrive_, backward_arrive_;  // per pass
  std::vector<i32> entering_;                          // passes without producers, by key
  std::vector<char> entered_;
  std::size_t entering_head_ = 0;
  i32 entering_in_flight_ = 0;       // passes that have not entered though their microbatch has
  std::vector<i32> to_enter_;        // per microbatch
  std::vector<char> backward_done_;  // per stage pair
  i64 load_in_flight_ = 0;
  i64 weights_seen_ = 0;
  bool any_wide_ = false;
};

}  // namespace pipeweaver
