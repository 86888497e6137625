"""The one place that knows which transformers `lvtp.hf` works with."""

from importlib.metadata import PackageNotFoundError, version

# 5.17 takes no encoded images (`mm_encoder_outputs`), so there is nothing to hand a pruned image to. 5.18 does, but
# mixes up the images of a prompt that has several under beam search.
MINIMUM = (5, 19)


def check_transformers() -> None:
    """Raises ImportError, naming the version found, the range wanted and the remedy."""
    wanted = f"transformers >= {MINIMUM[0]}.{MINIMUM[1]}"
    remedy = f"pip install 'transformers>={MINIMUM[0]}.{MINIMUM[1]}'"
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(f"lvtp.hf needs {wanted}, which is not installed. Remedy: {remedy}") from None
    if tuple(int(part) for part in found.split(".")[:2]) < MINIMUM:
        raise ImportError(f"lvtp.hf needs {wanted}, found {found}. Remedy: {remedy}")
