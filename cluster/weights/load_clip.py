"""CLIP loaded where a node is to compute with it."""

from typing import TYPE_CHECKING

from cluster.store.retries import load_with_retries
from cluster.weights.node_copy import local_clip
from pcm.model_faults import room_for_model
from pcm.spec import ClipSpec

if TYPE_CHECKING:
    from pcm.clip.encoder import ClipEncoder


def load_clip(spec: ClipSpec) -> "ClipEncoder":
    """The CLIP that a spec pins, from this machine's copy of it; as patient with its hub or store as
    `load_with_retries`.

    Raises InputError where its files are no longer what was pinned, or it does not fit into the device's memory.
    """
    from pcm.clip.encoder import ClipEncoder  # seconds to import, and who only plans needs none of it

    with room_for_model(f"CLIP {spec.model}", spec.device):
        return load_with_retries(lambda: ClipEncoder.from_spec(local_clip(spec)), model=spec.model)
