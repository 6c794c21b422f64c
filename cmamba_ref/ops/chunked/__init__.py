"""The backend `chunked`, fast eager PyTorch: `op` (its operators), `scan`, `recurrence`."""
