"""Memory modes: which one is chosen, and that every network has its weights when it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cascade.guides.controls import Control
from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.running.cache import WeightCache, cache_size
from cascade.running.packing import HostWeights
from cascade.running.placement import ALWAYS, GIB, MODES, MemoryMode, choose_memory
from cascade.running.streaming import divide, least
from cascade.stages.text import TextEncoder
from cascade.weights import NETWORKS, ModelFolder
from tests.components import copied
from tests.tiny import make_cascade

PUBLISHED = {
    "text_encoder": 1.29,
    "prior": 6.69,
    "decoder": 2.91,
    "vqgan": 0.035,
    "image_encoder": 0.57,
    "effnet": 0.08,
    "previewer": 0.02,
}
SIZES = {name: int(size * GIB) for name, size in PUBLISHED.items()}
CPU = torch.device("cpu")


class LateUploader:
    """Copies as late as possible, and fails for a copy that could overwrite memory in use.

    Work runs when it is launched. Copies run when work waits for them. A copy must not overwrite memory that is read by
    work launched after the last mark that the copy waits for.
    """

    def __init__(self, cache: Tensor) -> None:
        self.cache = cache
        self.asked: list[Callable[[], object]] = []
        self.bytes = 0
        self.done = 0
        self.marks = 0
        self.held = 0
        self.reads: list[tuple[int, int, int]] = []  # first byte, last byte + 1, marks at launch

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def hold(self, mark: int) -> None:
        self.held = max(self.held, mark)
        self.reads = [one for one in self.reads if one[2] >= self.held]

    def upload(self, target: Tensor, source: Tensor) -> None:
        assert target.numel() == source.numel()
        start = target.data_ptr() - self.cache.data_ptr()
        for first, last, _ in self.reads:
            assert last <= start or start + target.numel() <= first, "a copy may overwrite what is still read"
        self.asked.append(lambda: target.copy_(source))
        self.bytes += target.numel()

    def uploaded(self) -> int:
        return len(self.asked)

    def wait(self, uploaded: int) -> None:
        for copy_one in self.asked[self.done : uploaded]:
            copy_one()
        self.done = max(self.done, uploaded)

    def finish(self) -> None:
        self.wait(len(self.asked))

    def read(self, tensor: Tensor) -> None:
        """Launch work that reads a tensor."""
        start = tensor.data_ptr() - self.cache.data_ptr()
        if 0 <= start < self.cache.numel():
            self.reads.append((start, start + tensor.nbytes, self.marks))


def watch_reads(network: torch.nn.Module, uploader: LateUploader) -> None:
    """Report the reads of a network: each module's parameters, and those of the modules that it is given, when it runs."""

    def read(module: torch.nn.Module, given: tuple) -> None:
        for one in (module, *(one for one in given if isinstance(one, torch.nn.Module))):
            for parameter in one.parameters(recurse=not isinstance(one, StableCascadeUNet)):
                uploader.read(parameter.data)

    # Blocks report what is in them. Hooks there would have layers called that are else read.
    inside = {
        part
        for block in network.modules()
        if isinstance(block, ResBlock | AttnBlock)
        for part in block.modules()
        if part not in (block, getattr(block, "condition", None))
    }
    for module in network.modules():
        if module not in inside:
            module.register_forward_pre_hook(read)


def pack(components: dict[str, Any]) -> dict[str, HostWeights]:
    """Copies."""
    return {
        name: HostWeights(copied(part), pin=False)
        for name, part in components.items()
        if name in NETWORKS and name not in ALWAYS
    }


def make_cached(components: dict[str, Any], choice: MemoryMode, **options: Any) -> Cascade:
    """A Cascade whose networks share a cache, with late copies."""
    weights = pack(components)
    cache = WeightCache(weights, CPU, choice, uploader=LateUploader)
    cascade = make_cascade(components, **options)
    networks = {name: one.network for name, one in weights.items()}
    made = Cascade(
        TextEncoder(cascade.text.tokenizer, networks["text_encoder"]),
        networks["prior"],
        networks["decoder"],
        cascade.vqgan,
        ImagePromptEncoder(cascade.image_prompts.processor, networks["image_encoder"]),
        networks["effnet"],
        cascade.previewer,
        {kind: networks[f"controlnet_{kind}"] for kind in cascade.controlnets},
        networks["ip_adapter"],
        defaults=cascade.defaults,
        native_size=cascade.native_size,
        max_batch=cascade.max_batch,
        weights=cache,
    )
    for network in networks.values():
        watch_reads(network, cache.uploader)
    return made


@pytest.mark.parametrize(
    ("gib", "mode"),
    [(80, "resident"), (24, "resident"), (16, "resident"), (12, "offload"), (8, "offload"), (6, "stream")],
)
def test_what_is_chosen_for_the_published_networks(gib: float, mode: str) -> None:
    assert choose_memory("auto", SIZES, int(gib * GIB), 2).name == mode


@given(
    sizes=st.fixed_dictionaries({name: st.integers(1, 20 * GIB) for name in PUBLISHED}),
    available=st.integers(0, 200 * GIB),
    itemsize=st.sampled_from([2, 4]),
)
def test_what_is_chosen_fits(sizes: dict[str, int], available: int, itemsize: int) -> None:
    choice = choose_memory("auto", sizes, available, itemsize)
    always = sum(sizes[name] for name in ALWAYS)
    largest = max(size for name, size in sizes.items() if name not in ALWAYS)
    if choice.name == "resident":
        assert sum(sizes.values()) < available
    elif choice.name == "offload":
        assert always + largest < available
    else:
        assert choice.size == 0 or always + choice.size < available
    # With more memory, the mode is never a slower one.
    order = ("stream", "offload", "resident")
    assert order.index(choose_memory("auto", sizes, available + GIB, itemsize).name) >= order.index(choice.name)
    for mode in MODES[1:]:
        assert choose_memory(mode, sizes, available, itemsize) == MemoryMode(mode)


def test_sizes_are_those_of_the_tensors(model_folder: Path, components: dict[str, Any]) -> None:
    opened = ModelFolder.open(model_folder)
    for name in NETWORKS:
        network = components[name]
        for dtype in (torch.float32, torch.bfloat16):
            assert opened.size(name, dtype) == sum(
                one.numel() * (dtype.itemsize if one.is_floating_point() else one.itemsize)
                for one in network.state_dict().values()
            )


@settings(deadline=None)
@given(room=st.integers(0, 400_000))
def test_what_is_streamed_fits(prior_weights: HostWeights, room: int) -> None:
    first, *sizes = np.diff(prior_weights.bounds).tolist()
    assert least(prior_weights) <= first + 4 * max(sizes) < prior_weights.size
    room = max(room, least(prior_weights))
    staying, slots = divide(prior_weights, room)
    assert first + sum(sizes[i] for i in staying) + sum(slots) <= room
    passing = [size for i, size in enumerate(sizes) if i not in staying]
    for i, size in enumerate(passing):
        assert size <= slots[i % len(slots)]


@pytest.fixture(scope="module")
def prior_weights() -> HostWeights:
    return HostWeights(make_prior(), pin=False)


def make_prior() -> StableCascadeUNet:
    """A Stage C of 8 + 8 blocks, some of which run two or three times."""
    torch.manual_seed(0)
    return StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 3),
        up_num_layers_per_block=(3, 1),
        up_blocks_repeat_mappers=(2, 3),
        clip_text_in_channels=32,
        clip_text_pooled_in_channels=24,
        switch_level=(False,),
    ).eval()


def test_blocks_run_in_the_order_that_is_told() -> None:
    prior, seen = make_prior(), []
    for block in prior.blocks():
        block.register_forward_pre_hook(lambda module, _: seen.append(module))
    with torch.no_grad():
        prior(
            torch.randn(1, 16, 4, 4),
            torch.zeros(1),
            clip_text_pooled=torch.randn(1, 24),
            clip_text=torch.randn(1, 77, 32),
        )
    assert seen == prior.executed()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9])
def test_streamed_blocks_have_their_weights(part: float) -> None:
    """For any number of staying blocks, any order of forwards and conditions, and another network in between."""
    prior = make_prior()
    plain = copied(prior)
    weights = {"prior": HostWeights(prior, pin=False), "other": HostWeights(torch.nn.Linear(100, 100), pin=False)}
    lowest = least(weights["prior"])
    room = int(lowest + part * (weights["prior"].size - lowest))
    cache = WeightCache(weights, CPU, MemoryMode("stream", room), uploader=LateUploader)
    assert cache.streams("prior")
    assert not cache.streams("other")
    assert cache.memory.numel() <= room
    watch_reads(prior, cache.uploader)
    run = cache.wrap("prior", prior)
    generator = torch.Generator().manual_seed(1)
    for what in ("both", "both", "step", "other", "step", "both", "condition", "step", "other", "both", "fail", "both"):
        given = {"clip_text_pooled": torch.randn(1, 24, generator=generator)}
        given["clip_text"] = torch.randn(1, 77, 32, generator=generator)
        x, time = torch.randn(1, 16, 6, 4, generator=generator), torch.rand(1, generator=generator)
        with torch.no_grad():
            expected = plain.condition(**given)
            if what in ("both", "condition"):
                conditions = run.condition(**given)
                for one, two in zip(conditions.keys + conditions.values, expected.keys + expected.values, strict=True):
                    torch.testing.assert_close(one, two)
            if what in ("both", "step"):
                torch.testing.assert_close(run(x, time, expected), plain(x, time, expected))
            if what == "other":
                cache.use("other")
            if what == "fail":
                hook = prior.up_blocks[0][3].register_forward_pre_hook(fail)
                with pytest.raises(RuntimeError, match="as asked"):
                    run(x, time, expected)
                hook.remove()


def fail(*_: object) -> None:
    raise RuntimeError("failed as asked")


def test_copies_go_ahead_of_the_blocks() -> None:
    """Every block's upload is requested before the block runs, except the first block's."""
    prior = make_prior()
    weights = {"prior": HostWeights(prior, pin=False), "other": HostWeights(torch.nn.Linear(4, 4), pin=False)}
    cache = WeightCache(weights, CPU, MemoryMode("stream", 0), uploader=LateUploader)
    stream = cache.regions["prior"].stream
    run = cache.wrap("prior", prior)
    given = {"clip_text_pooled": torch.randn(1, 24), "clip_text": torch.randn(1, 77, 32)}
    late: list[int] = []
    with torch.no_grad():
        conditions = run.condition(**given)
        before = stream.before

        def watched(block: int) -> None:
            if stream.holds[block % len(stream.slots)] != block:
                late.append(block)
            before(block)

        stream.before = watched
        for _ in range(3):
            run(torch.randn(1, 16, 4, 4), torch.zeros(1), conditions)
    assert len(stream.orders["forward"]) > len(stream.slots)
    assert late == []


@settings(deadline=None, max_examples=60)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(["use", "prefetch", "release"]), st.lists(st.sampled_from("abcde"), min_size=1, max_size=3)
        ),
        max_size=30,
    ),
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
)
def test_in_any_order_each_finds_its_weights(calls: list[tuple[str, list[str]]], sizes: list[int]) -> None:
    weights = {
        name: HostWeights(torch.nn.Linear(64, 8 * size), pin=False) for name, size in zip("abcde", sizes, strict=True)
    }
    expected = {name: one.network.weight.detach().clone() for name, one in weights.items()}
    cache = WeightCache(weights, CPU, MemoryMode("offload"), uploader=LateUploader)
    assert cache.memory.numel() == max(one.size for one in weights.values())
    addresses = {name: one.network.weight.data_ptr() for name, one in weights.items()}
    for call, names in calls:
        if call == "use":
            cache.use(names[0])
            network = weights[names[0]].network
            assert torch.equal(network.weight, expected[names[0]])
            for tensor in network.parameters():
                cache.uploader.read(tensor.data)
        elif call == "prefetch":
            cache.prefetch(*names)
        else:
            cache.release()
    assert {name: one.network.weight.data_ptr() for name, one in weights.items()} == addresses


def test_prefetch_uploads_what_does_not_overlap() -> None:
    """While the decoder runs: the next request's text encoder, and the part of the prior that overlaps neither."""
    rows = {"text_encoder": 40, "prior": 200, "decoder": 80}
    weights = {name: HostWeights(torch.nn.Linear(64, number, bias=False), pin=False) for name, number in rows.items()}
    weights["prior"].blocks = weights["decoder"].blocks = [torch.nn.Identity()]  # placed at the cache's start
    cache = WeightCache(weights, CPU, MemoryMode("offload"), uploader=LateUploader)
    sizes = {name: one.size for name, one in weights.items()}

    def uploaded(call: Callable[..., None], *names: str) -> int:
        before = cache.uploader.bytes
        call(*names)
        return cache.uploader.bytes - before

    assert uploaded(cache.use, "decoder") == sizes["decoder"]
    overlap = sizes["decoder"] + sizes["text_encoder"]
    assert uploaded(cache.prefetch, "text_encoder", "prior") == sizes["text_encoder"] + sizes["prior"] - overlap
    assert uploaded(cache.use, "text_encoder") == 0
    assert uploaded(cache.use, "prior") == overlap


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offload", "stream", "tight"])
def test_every_mode_makes_the_same_pictures(components: dict[str, Any], mode: str) -> None:
    """Text, images, masks, controls, previews and batches, one request after the other."""
    weights = pack(components)
    choice = {"offload": MemoryMode("offload"), "stream": MemoryMode("stream"), "tight": MemoryMode("stream", 0)}[mode]
    resident = make_cascade(components, max_batch=2)
    cascade = make_cached(components, choice, max_batch=2)
    assert cascade.runner.weights.memory.numel() == cache_size(weights, choice)
    assert cascade.runner.weights.streams("prior") == (mode != "offload")
    image = resident.generate(Request("a dog", width=128, height=128, steps_prior=1, steps_decoder=1))[0]
    small = {"width": 128, "height": 128, "steps_prior": 2, "steps_decoder": 2}
    requests = [
        Request("a cat", num_images=3, **small),
        Request("a cat", image=image, prompt_strength=0.6, image_prompts=(image,), **small),
        Request("a cat", image=image, prompt_strength=0.0, **small),
        Request("a cat", image=image, mask=Image.new("L", (128, 128), "white"), **small),
        Request("a cat", controls=(Control("canny", image), Control("super_resolution", image)), **small),
        Request("a cat", num_images=3, **small),
    ]
    for request in requests:
        for one, other in zip(resident.generate(request), cascade.generate(request), strict=True):
            assert difference(one, other) <= 1
    # A caller may stop halfway, and call other methods between the steps.
    steps, others = cascade.steps(requests[0]), resident.steps(requests[0])
    for mine, theirs in zip(steps, others, strict=True):
        if mine.image is not None:
            assert difference(mine.image, theirs.image) <= 1
        else:
            cascade.preview(mine.latents[:1].expand(1, 16, -1, -1)) if mine.stage == "prior" else cascade.encode(image)
    next(cascade.steps(requests[1]))
    assert difference(cascade.reconstruct(image), resident.reconstruct(image)) <= 1


def difference(first: Image.Image, second: Image.Image) -> int:
    one, other = (np.asarray(image).astype(int) for image in (first, second))
    assert one.std() > 5
    return int(np.abs(one - other).max())
