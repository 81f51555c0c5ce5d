"""A cell's process in which one kernel is wrong: its attention sees what comes later. References are taken rightly."""

from __future__ import annotations

import sys

from torch.nn import functional as F

from packloop.bench import cell
from packloop.kernels import attention


def sees_everything(q_BHLD, k_BHLD, v_BHLD, layout, scale):
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, scale=scale)


if __name__ == "__main__":
    if "--references" not in sys.argv:
        attention._DIFFERENTIATED["sdpa"] = sees_everything
    cell.main()
