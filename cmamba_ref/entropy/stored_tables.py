"""Integer CDF tables as buffers of a module, so that they are saved and loaded with the weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cmamba_ref.entropy.tables import CdfTables
from cmamba_ref.errors import WeightsError

_NAMES = ("cdf", "starts", "offsets")


class TableBuffers(nn.Module):
    """Holds one `CdfTables`, empty until `store` or until a checkpoint with tables is loaded.

    A decoder never rebuilds tables: two machines that evaluate the same density need not round it
    to the same integers.  The tables a model was published with are the ones in its checkpoint.
    """

    cdf: Tensor
    starts: Tensor
    offsets: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in _NAMES:
            self.register_buffer(name, torch.zeros(0, dtype=torch.int32))
        self._tables: CdfTables | None = None

    @property
    def filled(self) -> bool:
        """Whether there are tables."""
        return self.cdf.numel() > 0

    def store(self, tables: CdfTables) -> None:
        """Take `tables` over."""
        for name in _NAMES:
            values = torch.from_numpy(np.array(getattr(tables, name), dtype=np.int32))
            setattr(self, name, values.to(self.cdf.device))

    def tables(self) -> CdfTables:
        """The tables for the coder.

        Raises:
            WeightsError: there are none yet, or the loaded ones are malformed.
        """
        if not self.filled:
            raise WeightsError(
                "the model has no entropy tables; call `model.update()` once after training, "
                "or load weights that were saved with tables"
            )
        # Copies, compared on each call: the coder's must not change unseen when a buffer does.
        arrays = [getattr(self, name).cpu().numpy() for name in _NAMES]
        known = self._tables
        if known is None or not all(
            np.array_equal(getattr(known, name), array)
            for name, array in zip(_NAMES, arrays, strict=True)
        ):
            tables = CdfTables(*(array.copy() for array in arrays))
            tables.validate()
            self._tables = known = tables
        return known

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # Tables are as long as the checkpoint says: an empty buffer must not refuse them.
        for name in _NAMES:
            loaded = state_dict.get(prefix + name)
            if loaded is not None:
                setattr(self, name, torch.empty_like(loaded, device=self.cdf.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
