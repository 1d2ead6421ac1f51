"""temporary"""

import torch


def take_rows_(message, first, rows, row_M, width):
    n = message.shape[0]
    vals = torch.where((row_M >= 0)[:, None], rows[row_M.clamp(min=0).long(), 0, :width], 0.0)
    status = torch.where(row_M >= 0, 0, row_M).float()
    out = torch.cat([vals, status[:, None]], 1).view(n, -1)
    message[:, first : first + out.shape[1]] = out
