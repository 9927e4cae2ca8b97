"""Numbers of the rule that are not meta-learned; csrc/rule/constants.h has the same, and import compares them."""

EPSILON = 1e-8  # of the paper: in logarithms and roots, and in the bias correction of losses
TINY = 1e-30  # keeps ratios of zeros finite
INPUT_BOUND = 5.0  # of the LSTM's logarithms and standardised losses
WAVES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)  # periods of the paper's time inputs, over 2 pi^2
LOG_TIME_SCALE = 8.0  # brings ln(steps) into the range of the other inputs
LAST_SHARE = 0.99  # ln(1 - .99 done): the logarithm of what is left, finite at the end
MIDDLE_SHARE, SLOW_SHARE = 0.01, 0.001  # of a new loss in the means between which a fall is looked for
FALL_SCALE = 10.0  # a fall by a tenth of the losses' standard deviation is ln 2
RISE_SCALE = 100.0  # a hundredth of the way down lost is a rise of ln 2
SMALLEST_SCALE = 0.3  # of a tensor, relative to the mean of all matrices
EMPTY_SCALE = 0.1  # when every parameter is zero
SCALE_GROWTH = 2.0  # factor within which a tensor's scale follows its parameters
MAX_LOG_STEP = 6.0  # bound of the learned log step multiplier
WARMUP = 10.0  # updates of a tensor until its learned step is whole
LARGEST = 1e14  # losses, gradients, and parameters in statistics, count as at most this: squares can be summed
LARGEST_PARAM = 3.3895313892515355e38  # an update beyond it is not made: the largest number of bfloat16
SCALE_OUTLIER = 10.0  # times the median: what a tensor's scale counts for at most among the others
GRAD_OUTLIER = 1e4  # the same of its mean squared gradient
LOSS_OUTLIER = 10.0  # standard deviations: how far from the mean a loss counts at most
NEWTON_SCHULZ_1, NEWTON_SCHULZ_3, NEWTON_SCHULZ_5 = 3.4445, -4.775, 2.0315  # of X, X X' X and (X X')^2 X
LEAST_ROW = 0.2  # of the typical norm of the rows of an orthogonalised direction, that a smaller one counts as
MAX_ASPECT = 16.0  # longer over shorter side of a matrix whose direction is orthogonalised
RESTING = 1e-4  # of the slow second moment: a parameter whose quick one is less rests; (.999 / .95)^180 is 1e4

#: All of them by name.
CONSTANTS: dict[str, float | tuple[float, ...]] = {name: value for name, value in globals().items() if name.isupper()}
