"""The numbers that compiled code branches on, or finds its places by; everyone else imports them."""

from __future__ import annotations

# Losses, optimizers, schedules and averages are integer codes with branches, so that one compilation serves them all.
SQUARED_ERROR, HUBER, EPSILON_INSENSITIVE, SQUARED_EPSILON_INSENSITIVE, QUANTILE = 0, 1, 2, 3, 4
LOG_LOSS, HINGE, SQUARED_HINGE, MODIFIED_HUBER, PERCEPTRON = 5, 6, 7, 8, 9
AUTO, SGD, ADAGRAD, ADAM, DOWG = 0, 1, 2, 3, 4
CONSTANT, OPTIMAL, INVSCALING, ADAPTIVE, COSINE = 0, 1, 2, 3, 4
AVERAGE_NONE, AVERAGE_UNIFORM, AVERAGE_POLYNOMIAL = 0, 1, 2
OK, DIVERGED = 0, 1

# Places in `codes`.
CODE_LOSS, CODE_OPTIMIZER, CODE_SCHEDULE, CODE_SOFTMAX, CODE_CLASSES = 0, 1, 2, 3, 4
CODE_INTERCEPT, CODE_AVERAGE, CODE_NESTEROV, CODE_MOMENTS = 5, 6, 7, 8
N_CODES = 9
# Places in `params`; those from PARAM_WIDTH on are the shape of the loss, see `streamgd.learn.losses.Loss`.
PARAM_L1, PARAM_L2, PARAM_ETA0, PARAM_POWER_T, PARAM_MOMENTUM = 0, 1, 2, 3, 4
PARAM_BETA_1, PARAM_BETA_2, PARAM_EPSILON, PARAM_OPTIMAL_START = 5, 6, 7, 8
PARAM_N_UPDATES, PARAM_AVERAGE_FROM, PARAM_MEAN_WEIGHT, PARAM_ALPHA = 9, 10, 11, 12
PARAM_WIDTH, PARAM_KNEE, PARAM_BEND, PARAM_STEEP, PARAM_OVER, PARAM_UNDER = 13, 14, 15, 16, 17, 18
N_PARAMS = 19
# Places in `scalars`: the epoch's weighted progressive loss, the weight behind it, rows times penalty; what the
# adaptive schedule made of eta0; Adam's running powers (kept as products, so that no pow is needed); DoWG's two
# numbers; the best epoch so far; the value that was not finite.
LOSS_SUM, WEIGHT_SUM, PENALTY_SUM, ETA_SCALE, BETA_1_POWER, BETA_2_POWER = 0, 1, 2, 3, 4, 5
DOWG_DISTANCE, DOWG_SUM, BEST_OBJECTIVE, BAD_VALUE = 6, 7, 8, 9
N_SCALARS = 10
# Places in `counters`: the cursor, the rows of the open batch, updates done, rows consumed in this epoch and in all, …
EPOCH, WINDOW, ROW, N_CARRY, N_UPDATES, EPOCH_ROWS, N_ROWS, STATUS, NO_IMPROVEMENT = 0, 1, 2, 3, 4, 5, 6, 7, 8
N_COUNTERS = 9
