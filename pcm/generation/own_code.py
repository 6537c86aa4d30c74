"""Python of a model's own folder, which is never run."""

from pathlib import Path

import pcm.torchvision_shim  # noqa: F401  isort: skip
import diffusers.pipelines

from pcm.documents import read_document
from pcm.errors import InputError, first_line
from pcm.generation.pipeline_index import MODEL_INDEX

#: Libraries that a pipeline's parts may come from, beside modules of diffusers.pipelines (`stable_diffusion` has a
#: safety checker); anything else is a file of the model's folder.
LIBRARIES = ("diffusers", "transformers")


def refuse_own_code(folder: Path) -> None:
    """Raises InputError where a pipeline's folder names Python that is not of diffusers or transformers.

    diffusers is told not to run any; this says which part it is, before anything is loaded.
    """
    try:
        parts = read_document((folder / MODEL_INDEX).read_bytes())
    except FileNotFoundError:
        return  # diffusers says what is missing
    except ValueError as error:
        raise InputError(f"{folder / MODEL_INDEX}: not valid JSON ({first_line(error)})") from None
    for name, part in parts.items() if isinstance(parts, dict) else ():
        if name == "_class_name":
            known = isinstance(part, str)
        else:
            known = not isinstance(part, list) or not part or part[0] is None or _is_known(part[0])
        if not known:
            raise InputError(
                f"{folder / MODEL_INDEX}: {name} {part!r} is Python code of the model's own, which is never run; "
                f"give a pipeline whose parts come from {' and '.join(LIBRARIES)}"
            )


def _is_known(library: object) -> bool:
    return library in LIBRARIES or (isinstance(library, str) and hasattr(diffusers.pipelines, library))
