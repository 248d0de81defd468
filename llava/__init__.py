"""LLaVA-1.5: its data, models, training and evaluation; what everything else imports first."""

import os

# Without this oneMKL, which multiplies PyTorch's float32 matrices on a CPU, chooses its kernels by
# where in memory the operands lie and by the number of threads too, and the same command may give
# other last bits the next time (promises P5 and P6). It reads the variable once, before its first
# product at the latest. AUTO means the kernels of the processor at hand, at 1 to 3 % of the time; a
# set called by its name is slower on some (AVX2 where there is AVX-512: 1.3 times the time).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
