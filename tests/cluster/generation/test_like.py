"""jobs.generate --spec: another dataset's settings, all of them, and what is given beside them."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.dataset.documents import CorpusSource, MadeWith, Manifest, load_manifest
from cluster.dataset.keys import CONCEPTS_KEY, MANIFEST_KEY
from cluster.dataset.vocabularies import GivenConcepts
from cluster.generation import make
from cluster.generation.like import (
    OF_CORPUS,
    check_alike,
    read_spec_manifest,
    settings_of,
    with_settings,
    with_spec,
)
from cluster.generation.make import generate
from cluster.generation.pinning import dataset_spec
from cluster.generation.request import (
    FaultOptions,
    GenerateRequest,
    GenerationOptions,
    MachineOptions,
    WatchOptions,
)
from cluster.options import given, options_of
from cluster.store.store import open_store
from pcm.errors import InputError
from pcm.records import NULL_FEATURES
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec
from pcm.text.concepts import ConceptVocabulary
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus
from tests.pcm.generation.test_pipeline_signature import pipeline_of


def asked(**options: object) -> GenerateRequest:
    return GenerateRequest(corpus="captions.txt", out="out", spec="dataset.json", **options)  # type: ignore[arg-type]


@pytest.fixture
def spec(tiny_t2i: Path, tiny_clip: Path) -> DatasetSpec:
    """Of a request with every kind of setting away from its default."""
    request = GenerateRequest(
        corpus="captions.txt", out="out", t2i=str(tiny_t2i), clip=str(tiny_clip), steps=3, guidance_scale=4.5,
        width=64, height=32, scheduler="DPMSolverMultistepScheduler", scheduler_options={"use_karras_sigmas": True},
        negative_prompt="blurred", prompt_template="a photo of {caption}", images_per_caption=2, seed=9, max_attempts=5,
        image_format="webp", image_quality=80, clip_batch_size=7, batch_size=3, attention="eager", vae_slicing=True,
        prompt_cache=True, device="cpu", dtype="float32",
    )  # fmt: skip
    return dataset_spec(request, gpus=0)


def test_the_same_spec_comes_out(spec: DatasetSpec) -> None:
    found = dataset_spec(with_spec(asked(), spec), gpus=0)
    assert found == spec
    assert DatasetSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == found, "through dataset.json, too"


def test_a_whole_number_of_guidance_keeps_its_form(spec: DatasetSpec) -> None:
    """7 and 7.0 are equal, and their seeds are not."""
    spec = replace(spec, generator=replace(spec.generator, guidance_scale=7))
    found = dataset_spec(with_spec(asked(), spec), gpus=0)
    assert json.dumps(found.to_dict()) == json.dumps(spec.to_dict())


#: Every option that --spec takes from the spec itself.
OF_SPEC = {
    *settings_of(null_spec()),
    *settings_of(replace(null_spec(), generator=replace(null_spec().generator, model="embedded"))),
}
#: Options that decide no byte of a dataset, and the corpus, which is given.
NEVER_TAKEN = {"corpus", *(name for kind in (MachineOptions, WatchOptions, FaultOptions) for name in options_of(kind))}


def test_every_option_of_a_dataset_is_taken_or_decides_no_byte_of_it() -> None:
    """An option that is added must be taken over by `settings_of` or `with_settings`, or change no dataset."""
    taken = OF_SPEC | {"shard_size", "nouns", "concepts", *OF_CORPUS}
    assert taken | NEVER_TAKEN == set(options_of(GenerationOptions))
    assert not taken & NEVER_TAKEN


def test_every_field_of_the_record_is_taken() -> None:
    """A field that is added to what dataset.json says beside the spec must be taken, too."""
    compared = {"noun_versions": "nouns", "source": OF_CORPUS[0]}
    fields = {compared.get(name, name) for name in MadeWith.__dataclass_fields__}
    assert fields == {"shard_size", "nouns", "concepts", OF_CORPUS[0]}
    read = set(CorpusSource.__dataclass_fields__) - {"sha256"}
    assert read == {"format" if name == "corpus_format" else name for name in OF_CORPUS}


def test_every_setting_of_a_spec_has_an_option() -> None:
    """A field that is added to a spec must be taken over, or be one that no option decides."""
    taken = OF_SPEC
    renamed = {
        "model": "t2i", "revision": "t2i_revision", "variant": "t2i_variant", "without": "t2i_without",
        "config": "t2i_config", "loras": "lora", "num_inference_steps": "steps",
    }  # fmt: skip
    follow = {"vae_revision", "config_revision", "cpu_threads"}
    fields = set(null_spec().generator.__dataclass_fields__) - follow
    assert {renamed.get(name, name) for name in fields} <= taken


def test_what_is_given_beside_it_wins(spec: DatasetSpec) -> None:
    request = asked(seed=4, steps=2)
    own = set(given(request))
    found = dataset_spec(with_spec(request, spec), gpus=0)
    assert (found.seed, found.generator.num_inference_steps) == (4, 2)
    assert found == replace(spec, seed=4, generator=replace(spec.generator, num_inference_steps=2))
    check_alike(found, spec, own, uri="dataset.json")


def test_a_model_that_is_another_now_is_refused(spec: DatasetSpec) -> None:
    wanted = replace(spec, generator=replace(spec.generator, revision="sha256:another"))
    request = asked()
    found = dataset_spec(with_spec(request, wanted), gpus=0)
    with pytest.raises(InputError, match=r"--spec dataset.json: cannot be taken as it is \(generator.model: "):
        check_alike(found, wanted, set(given(request)), uri="dataset.json")


def test_another_model_has_its_own_revision(spec: DatasetSpec) -> None:
    repo = replace(spec, generator=replace(spec.generator, model="org/repo", revision="a" * 40))
    assert with_spec(asked(), repo).t2i_revision == "a" * 40
    assert with_spec(asked(t2i="org/other"), repo).t2i_revision is None
    found = dataset_spec(with_spec(asked(t2i="null", clip="null"), spec), gpus=0)
    assert found.generator.model == "null", "what only a model listens to is left out"


def test_what_is_no_manifest_of_drawn_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match=r"--spec .*dataset\.json: "):
        read_spec_manifest(str(tmp_path / "dataset.json"))
    with pytest.raises(InputError, match=r"--spec .*: is a folder; give its dataset\.json$"):
        read_spec_manifest(str(tmp_path))
    (tmp_path / "config.json").write_text('{"train": {"epochs": 1}}')
    with pytest.raises(InputError, match=r"^--spec [^ ]*config\.json: is no dataset\.json; give that of a dataset$"):
        read_spec_manifest(str(tmp_path / "config.json"))
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    document = json.loads((tmp_path / "data" / MANIFEST_KEY).read_bytes())
    document["spec"]["generator"]["model"] = "photos"
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"were not drawn by one generator here \(photos\)"):
        read_spec_manifest(str(tmp_path / "dataset.json"))
    with pytest.raises(InputError, match="--spec, --preset: give one of the two"):
        asked(preset="synthimgcap_coco")


def test_a_dataset_is_drawn_by_the_settings_of_another(tmp_path: Path, ray_session: None) -> None:
    corpus = write_corpus(tmp_path)
    options = {"corpus": str(corpus), "limit": 6, "shard_size": 3}
    generate(GenerateRequest(out=str(tmp_path / "one"), t2i="null", seed=5, image_format="png", **options))  # type: ignore[arg-type]
    manifest = tmp_path / "one" / MANIFEST_KEY
    generate(GenerateRequest(out=str(tmp_path / "two"), spec=str(manifest), **options))  # type: ignore[arg-type]
    one, two = (open_store(tmp_path / name).read_bytes("shards/part-000000.parquet") for name in ("one", "two"))
    assert one == two


KARPATHY = {
    "images": [
        {"filename": f"{number}.jpg", "cocoid": number, "split": ("train", "val")[number % 2],
         "sentences": [{"raw": f"A dog number {number} near a table.", "sentid": number}]}
        for number in range(12)
    ]
}  # fmt: skip


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps(KARPATHY))
    return path


def record(source: CorpusSource | None = None, **changes: object) -> Manifest:
    """A manifest that says these things beside its spec."""
    found = MadeWith(**{"shard_size": 7, "source": source, "nouns": "lexicon", **changes})  # type: ignore[arg-type]
    return Manifest.from_json(replace(TINY_MANIFEST, made_with=found).to_json())


TINY_MANIFEST = Manifest(
    spec=null_spec(), corpus="captions.txt", corpus_fingerprint="0", features=NULL_FEATURES, expected=0, stored=0,
    quarantined=0, quarantined_by_reason={}, clip_score_mean=None, shard_bytes=0, shards=(),
)  # fmt: skip


def test_the_same_command_on_the_same_corpus_makes_the_same_dataset(
    tmp_path: Path, karpathy: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Though it says nothing of the split, the number of captions and the size of a shard."""
    options = {"split": "val", "limit": 5, "shard_size": 2, "corpus_format": "karpathy", "seed": 3, "t2i": "null"}
    generate(GenerateRequest(corpus=str(karpathy), out=str(tmp_path / "one"), **options))  # type: ignore[arg-type]
    one = load_manifest(open_store(tmp_path / "one"))
    assert one.made_with is not None and one.made_with.source is not None
    assert (one.made_with.shard_size, one.made_with.source.split, one.made_with.source.limit) == (2, "val", 5)
    assert (one.made_with.nouns, one.made_with.noun_versions, one.made_with.concepts) == ("lexicon", {}, None)
    spec = str(tmp_path / "one" / MANIFEST_KEY)
    with caplog.at_level("INFO", logger="cluster.generation.like"):
        generate(GenerateRequest(corpus=str(karpathy), out=str(tmp_path / "two"), spec=spec))
    assert f"--spec {spec}: of the same corpus, so --split val --limit 5 is taken" in caplog.text
    assert load_manifest(open_store(tmp_path / "two")) == one
    other = GenerateRequest(corpus=str(karpathy), out="out", spec=spec, limit=3, shard_size=4)
    found = with_settings(other, one, uri=spec)
    assert (found.limit, found.shard_size, found.split) == (3, 4, "val"), "what is given wins"


def test_how_another_corpus_is_read_is_not_taken_and_said(
    tmp_path: Path, karpathy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = record(CorpusSource("another", "auto", "val", 16))
    with caplog.at_level("INFO", logger="cluster.generation.like"):
        found = with_settings(asked_of(karpathy), wanted, uri="dataset.json")
    assert (found.split, found.limit, found.shard_size) == ("train", None, 7)
    assert caplog.messages == ["--spec dataset.json: of another corpus; its --split, --limit: not taken"]


def asked_of(corpus: Path, **options: object) -> GenerateRequest:
    return GenerateRequest(corpus=str(corpus), out="out", spec="dataset.json", **options)  # type: ignore[arg-type]


def test_a_dataset_of_an_earlier_release_says_what_it_lacks(karpathy: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert with_settings(asked_of(karpathy), TINY_MANIFEST, uri="dataset.json").shard_size is None
    assert "does not say and this does not take: --shard-size, --nouns, --concepts, --corpus-format" in caplog.text


def test_a_view_says_what_it_was_made_of(karpathy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    curate(CurateRequest(data=(str(tmp_path / "data"),), out=str(tmp_path / "view"), max_words=99))
    uri = str(tmp_path / "view" / MANIFEST_KEY)
    assert with_settings(asked_of(karpathy), read_spec_manifest(uri), uri=uri).shard_size is None
    assert f"jobs.curate derived it from {tmp_path / 'data'}, whose dataset.json may say more; it does" in caplog.text
    assert "earlier release" not in caplog.text


def test_what_found_the_nouns_is_taken_or_refused(karpathy: Path) -> None:
    assert with_settings(asked_of(karpathy), record(), uri="dataset.json").nouns == "lexicon"
    versions = {"spacy": "3.8.0", "xx_no_such_model": "1.0"}
    scored = replace(null_spec(), clip=ClipSpec(model="embedded", revision="sha256:0"))
    spacy = replace(record(nouns="xx_no_such_model", noun_versions=versions), spec=scored)
    with pytest.raises(InputError, match="spaCy model 'xx_no_such_model' is not installed"):
        with_settings(asked_of(karpathy), spacy, uri="dataset.json")
    concepts = asked_of(karpathy, concepts="concepts.pkl")
    assert with_settings(concepts, spacy, uri="dataset.json").nouns == "lexicon", "of no effect beside these"
    assert with_settings(asked_of(karpathy, clip="null"), spacy, uri="dataset.json").nouns == "lexicon", "none are made"


def test_concepts_that_were_given_are_taken_from_beside_it(tmp_path: Path, karpathy: Path, tiny_clip: Path) -> None:
    folder = tmp_path / "one"
    store = open_store(folder)
    concepts = ConceptVocabulary(("dog", "table"), np.eye(2, 16, dtype=np.float32))
    GivenConcepts(concepts).store(store)
    digest = hashlib.sha256(concepts.to_bytes()).hexdigest()
    scored = replace(null_spec(), clip=ClipSpec(model="embedded", revision="sha256:0"))
    wanted, uri = replace(record(nouns=None, concepts=digest), spec=scored), str(folder / MANIFEST_KEY)
    assert with_settings(asked_of(karpathy), wanted, uri=uri).concepts == str(folder / CONCEPTS_KEY)
    assert with_settings(asked_of(karpathy, clip="null"), wanted, uri=uri).concepts is None
    with pytest.raises(InputError, match="its concepts were given, for its own CLIP; give --concepts beside --clip"):
        with_settings(asked_of(karpathy, clip=str(tiny_clip)), wanted, uri=uri)
    given_ones = asked_of(karpathy, clip=str(tiny_clip), concepts="others.pkl")
    assert with_settings(given_ones, wanted, uri=uri).concepts == "others.pkl"
    store.write_bytes(CONCEPTS_KEY, b"others")
    with pytest.raises(InputError, match=r"are not at .*concepts.safetensors; give the same --concepts"):
        with_settings(asked_of(karpathy), wanted, uri=uri)


def test_repos_are_taken_at_the_commits_of_the_dataset(spec: DatasetSpec) -> None:
    """None is looked up; there is no hub here."""
    old = "a" * 40
    loras = (("org/lora", old, 1.0), ("org/loras/one.safetensors", old, 0.5))
    wanted = replace(spec, generator=replace(spec.generator, loras=loras, vae="org/vae", vae_revision=old))
    assert dataset_spec(with_spec(asked(), wanted), gpus=0) == wanted
    single = replace(spec, generator=replace(spec.generator, config="org/config", config_revision=old))
    assert with_spec(asked(), single).t2i_config == f"org/config@{old}"


def test_what_has_no_place_beside_what_is_given_is_not_taken(
    spec: DatasetSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu = replace(spec, generator=replace(spec.generator, device="cuda", offload="model"))
    request = asked(device="cpu")
    with caplog.at_level("INFO", logger="cluster.generation.like"):
        found = dataset_spec(with_spec(request, on_gpu), gpus=0)
    assert (found.generator.device, found.generator.offload) == ("cpu", "none")
    said = [record.getMessage() for record in caplog.records if record.name == "cluster.generation.like"]
    assert said == ["--spec: its --offload model is for GPUs, and not taken beside --device cpu"]
    wanted = replace(on_gpu, clip=replace(on_gpu.clip, device="cuda"))
    check_alike(found, wanted, set(given(request)), uri="dataset.json")
    assert with_spec(asked(), on_gpu).offload == "model"
    single = replace(spec, generator=replace(spec.generator, config="/config", config_revision="sha256:0"))
    assert with_spec(asked(t2i="org/repo"), single).t2i_config is None
    folder = replace(spec, generator=replace(spec.generator, variant="fp16", without=("safety_checker",)))
    (tmp_path / "one.safetensors").write_bytes(b"")
    of_file = with_spec(asked(t2i=str(tmp_path / "one.safetensors")), folder)
    assert (of_file.t2i_variant, of_file.t2i_without) == (None, ())


def test_guidance_that_holds_anyway_is_taken(tmp_path: Path) -> None:
    """Of FLUX.1-schnell, which has none: to give another is refused."""
    folder = pipeline_of(tmp_path / "FLUX.1-schnell", "FluxPipeline", transformer={"guidance_embeds": False})
    request = GenerateRequest(corpus="captions.txt", out="out", t2i=str(folder), clip="null")
    spec = dataset_spec(request, gpus=0)
    assert (spec.generator.num_inference_steps, spec.generator.guidance_scale) == (4, 0.0)
    assert dataset_spec(with_spec(asked(), spec), gpus=0) == spec
    with pytest.raises(InputError, match="--guidance-scale 3: without effect on this FluxPipeline"):
        dataset_spec(with_spec(asked(guidance_scale=3.0), spec), gpus=0)


def drawn_like(wanted: DatasetSpec, **options: object) -> GeneratorSpec:
    """What --spec makes of a dataset beside these options."""
    request = asked(**options)
    own = set(given(request))
    found = dataset_spec(with_spec(request, wanted), gpus=0, own=own)
    check_alike(found, wanted, own, uri="dataset.json")
    assert dataset_spec(with_spec(request, wanted), gpus=0, own=own, begun=found) == found, "resumed"
    return found.generator


def test_guidance_without_effect_is_refused_only_where_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where an older dataset has it, nor beside another model."""
    flux = {"name": "FluxPipeline", "transformer": {"guidance_embeds": False}}
    schnell = pipeline_of(tmp_path / "FLUX.1-schnell", **flux)  # type: ignore[arg-type]
    spec = dataset_spec(GenerateRequest(corpus="captions.txt", out="out", t2i=str(schnell), clip="null"), gpus=0)
    older = replace(spec, generator=replace(spec.generator, num_inference_steps=28, guidance_scale=3.5))
    assert drawn_like(older) == older.generator
    with pytest.raises(InputError, match="--guidance-scale 3: without effect on this FluxPipeline"):
        drawn_like(older, guidance_scale=3.0)

    def spec_is_checked(found: DatasetSpec, *rest: object, **options: object) -> None:
        raise RuntimeError(f"{found == older}")

    monkeypatch.setattr(make, "check_alike", spec_is_checked)
    (tmp_path / MANIFEST_KEY).write_bytes(replace(TINY_MANIFEST, spec=older).to_json())
    with pytest.raises(RuntimeError, match="True"):
        generate(GenerateRequest(corpus="embedded", out=str(tmp_path / "out"), spec=str(tmp_path / MANIFEST_KEY)))
    moved = shutil.copytree(schnell, tmp_path / "copy")
    assert drawn_like(spec, t2i=str(moved)).num_inference_steps == 4

    lightning = tmp_path / "Qwen-Image-Lightning-4steps.safetensors"
    save_file({}, lightning)
    qwen = str(pipeline_of(tmp_path / "qwen", "QwenImagePipeline"))
    request = GenerateRequest(corpus="captions.txt", out="out", t2i=qwen, clip="null", lora=((str(lightning), 1.0),))
    now = dataset_spec(request, gpus=0)
    assert now.generator.guidance_scale is None
    older = replace(now, generator=replace(now.generator, guidance_scale=0.0))
    assert drawn_like(older) == older.generator

    sdxl = str(pipeline_of(tmp_path / "sdxl", "StableDiffusionXLPipeline"))
    wanted = dataset_spec(GenerateRequest(corpus="captions.txt", out="out", t2i=sdxl, clip="null"), gpus=0)
    assert wanted.generator.guidance_scale == 5.0
    assert drawn_like(wanted, t2i=str(schnell)).guidance_scale == 0.0
    assert drawn_like(wanted, t2i=qwen).guidance_scale is None
