"""How much the engine takes at a time, and how often: the planner counts it, the engine does it."""

VOCABULARY_WINDOWS = 16  # in which the teacher says which tokens it expects, where not all stay
VOCABULARY_LOGITS = 2**25  # of all its tokens that are held then, in float32
ROUTER_BYTES = 2**28  # of outputs of all experts of a block (pruning/reconstruct)
ANSWER_TOKENS = 112  # most of a sampled answer, by which models are judged (judge/answers)
GREEDY_TOKENS = 96  # most of a greedy one
ANSWERS_AT_ONCE = (72, 24, 8, 1)  # written together, as many as fit
PAIRS_AT_ONCE = (144, 96, 72, 48, 24, 8, 2, 1)  # the teacher's, sampled and greedy side by side
