from loopdiag.bootstrap import DRAWS, interval, resampled_means  # noqa
