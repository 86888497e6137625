"""Visual-token pruning inside Hugging Face transformers models.

    with lvtp.hf.prune(model, method="id_selection", keep=64) as pruning:
        out = model.generate(**inputs, max_new_tokens=32)
    pruning.last.kept       # which prompt tokens the language model read

The prompt is rewritten once, before the language model: the model's own vision tower and projector encode the images, a
selector picks the tokens, and the shorter prompt goes in through transformers' own argument for pre-encoded images.
Nothing inside the language model is patched, so attention kernels, caches, beams and chunked prefill work as they do.
"""

from lvtp.hf.requirement import check_transformers

check_transformers()

from lvtp.hf.families import supported  # noqa: E402
from lvtp.hf.info import Info, info  # noqa: E402
from lvtp.hf.patch import Pruning, patch, prune  # noqa: E402
from lvtp.hf.rewrite import Pruned, prepare  # noqa: E402

__all__ = ["Info", "Pruned", "Pruning", "info", "patch", "prepare", "prune", "supported"]
