"""`pretrain.train` with a rank 1 that is slow: each of its layer norms takes 5 ms more."""

import os
import runpy
import time

from torch import nn


class SlowNorm(nn.LayerNorm):
    def forward(self, x):
        time.sleep(0.005)
        return super().forward(x)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        nn.LayerNorm = SlowNorm
    runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)
