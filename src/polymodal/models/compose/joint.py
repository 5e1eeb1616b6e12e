"""The passes of an encoder backbone: joint states, hidden places, captions, and pairs that do not belong together.

Shape legend: ``S`` samples, ``U`` units, ``M`` tokens of one stream, ``W`` width, ``K`` predicted places, ``L`` places
of a unit, ``N`` mixed samples, ``P`` values of a patch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymodal.core.batch import Batch, Outputs, StreamBatch, TokenOutput
from polymodal.core.errors import ConfigError
from polymodal.core.passes import TokenPass
from polymodal.models.backbones.encoder import EncoderBackbone, JointStates
from polymodal.models.compose.masking import TokenChoice, mask_blocks, mask_tokens, normalised_patches
from polymodal.models.compose.merge import by_sample
from polymodal.models.compose.negatives import Mismatches, mixed_samples
from polymodal.models.compose.queries import QueryRun
from polymodal.models.encoders.base import Encoder, Features
from polymodal.models.encoders.masking import PatchMasking
from polymodal.models.heads.masked_token import MaskedTokenHead
from polymodal.models.layers.convolution import valid_mask
from polymodal.models.layers.memory import Memory

if TYPE_CHECKING:
    from polymodal.models.compose.model import MultimodalModel

Tokens = dict[str, Tensor]


Shown = tuple[Tensor, Tensor]
"""What an encoder sees of a stream with places hidden: its input, and which places those are, bool ``[U, L]``."""


@dataclass(slots=True)
class Hidden:
    """One stream with places hidden.

    Args:
        features: of its encoder, which saw the hidden places hidden.
        is_masked_UM: bool, which features stand for places to be predicted.
        values_UM: what stood there: token ids ``[U, M]``; None for pictures, where it depends on the head.
        shown: what the encoder saw, for another model that must see the same.
    """

    features: Features
    is_masked_UM: Tensor
    values_UM: Tensor | None = None
    shown: Shown | None = None


class JointRun:
    """One batch's way through a model with an encoder backbone.

    Args:
        model: the model.
        batch: the batch.
        features: of the streams that were encoded.
        shown: per run of masked modelling and stream, what was hidden before and is hidden again; else it is drawn.
    """

    def __init__(
        self,
        model: MultimodalModel,
        batch: Batch,
        features: Mapping[str, Features],
        shown: Mapping[TokenPass, Mapping[str, Shown]] | None = None,
    ) -> None:
        self.model, self.batch, self.features = model, batch, features
        self.shown = shown or {}

    @property
    def backbone(self) -> EncoderBackbone:
        """The encoder backbone.

        Raises:
            ConfigError: if the model has another one.
        """
        backbone = self.model.backbone
        if not isinstance(backbone, EncoderBackbone):
            raise ConfigError(
                f"this needs an encoder backbone; the model's backbone is {self.model.config.backbone.use!r}"
            )
        return backbone

    def lay_out(self, features: Mapping[str, Features]) -> tuple[Tokens, Tokens]:
        """Per entering stream, connected tokens ``[S, M, W]`` and which are valid ``[S, M]``."""
        tokens, is_valid = {}, {}
        config = self.model.config
        for name in (*config.sequence_streams, *config.watched_streams):
            if name not in features:
                continue
            stream, found = self.batch.streams[name], features[name]
            connector: Any = self.model.streams[name].connector
            pair = (found.x_UND, found.is_valid_UN)
            x_UMW, valid_UM = pair if connector is None else connector(*pair)
            tokens[name] = by_sample(x_UMW, stream, self.batch.num_samples)
            is_valid[name] = by_sample(valid_UM, stream, self.batch.num_samples)
        if not tokens:
            raise ConfigError("encoder backbone: no sample of the batch has one of the streams that enter it")
        return tokens, is_valid

    def states(
        self, tokens: Mapping[str, Tensor], is_valid: Mapping[str, Tensor], causal: Collection[str] = ()
    ) -> JointStates:
        """The backbone's states of laid-out tokens."""
        memory = self.memory(tokens, is_valid)
        own = [name for name in self.model.config.sequence_streams if name in tokens]
        if not own:
            tokens, is_valid = self._no_tokens(next(iter(tokens.values())))
            own = list(tokens)
        given, valid = {n: tokens[n] for n in own}, {n: is_valid[n] for n in own}
        states: JointStates = self.backbone(given, valid, memory, causal)
        return states

    def memory(self, tokens: Mapping[str, Tensor], is_valid: Mapping[str, Tensor]) -> Memory | None:
        """What the backbone looks at beside its sequence; None: nothing."""
        watched = [name for name in self.model.config.watched_streams if name in tokens]
        if not watched:
            return None
        x_SMW = torch.cat([tokens[name] for name in watched], dim=1)
        return Memory(x_SMW, torch.cat([is_valid[name] for name in watched], dim=1))

    def _no_tokens(self, like: Tensor) -> tuple[Tokens, Tokens]:
        """A sequence that holds nothing of the first stream, for batches that hold only what is looked at."""
        name = self.backbone.order[0]
        x_S1W = like.new_zeros(len(like), 1, self.backbone.config.width)
        return {name: x_S1W}, {name: torch.zeros(len(like), 1, dtype=torch.bool, device=like.device)}

    def alone(self, name: str) -> tuple[Tensor, Tensor]:
        """State ``[I, W]`` of each sample that has a stream, that stream alone in the backbone, and the samples."""
        tokens, is_valid = self.lay_out({name: self.features[name]})
        samples_I = torch.unique(self.batch.streams[name].sample_of_item)
        pooled_SW = self.states(tokens, is_valid).pooled_SW
        return pooled_SW[samples_I], samples_I

    def merge(self, outputs: Outputs, mismatches: Mismatches | None) -> None:
        """Fill what is read of whole samples.

        Args:
            outputs: to fill.
            mismatches: of which samples that do not belong together are mixed as well; None: none.
        """
        tokens, is_valid = self.lay_out(self.features)
        outputs.merged = self.states(tokens, is_valid).pooled_SW
        for name, config in self.model.config.heads.items():
            if config.use == "class" and config.stream is None:
                outputs.class_logits = self.model.heads[name](outputs.merged)
            elif config.use == "matching":
                outputs.match_logits = self.model.heads[name](outputs.merged).squeeze(-1)
        if mismatches is None:
            return
        mixed, valid, samples = mixed_samples(mismatches, tokens, is_valid, outputs.embeddings)
        outputs.mismatch_samples = samples
        states = self.states(mixed, valid).pooled_SW if len(samples) else outputs.merged[:0]
        outputs.mismatch_logits = self.model.head("matching")(states).squeeze(-1)

    def tokens(self, passes: Iterable[TokenPass]) -> dict[TokenPass, TokenOutput]:
        """The outputs of masked and caption passes; those that differ in their head alone share one run."""
        groups: dict[TokenPass, list[tuple[TokenPass, MaskedTokenHead]]] = {}
        for needed in sorted(passes, key=repr):
            groups.setdefault(needed.run, []).append((needed, self._head(needed)))
        found: dict[TokenPass, TokenOutput] = {}
        for run, wanted in groups.items():
            if run.kind == "caption":
                found.update({needed: self._caption(head) for needed, head in wanted})
            else:
                found.update(self._masked(run, wanted))
        return found

    def _head(self, needed: TokenPass) -> MaskedTokenHead:
        return token_head(self.model, needed)

    def _masked(self, run: TokenPass, wanted: list[tuple[TokenPass, MaskedTokenHead]]) -> dict[TokenPass, TokenOutput]:
        if any(head.config.at == "queries" for _, head in wanted):
            raise ConfigError("masked modelling: found a head at 'queries', where texts are generated; use 'caption'")
        before = self.shown.get(run, {})
        hidden = {
            name: self.hide(name, rate, before.get(name)) for name, rate in run.mask if name in self.batch.streams
        }
        joint: JointStates | None = None
        if any(head.config.at == "backbone" for _, head in wanted) and hidden:
            features = {**self.features, **{name: each.features for name, each in hidden.items()}}
            joint = self.states(*self.lay_out(features))
        found = {}
        for needed, head in wanted:
            stream = head.config.stream
            if stream not in dict(run.mask):
                raise ConfigError(
                    f"head of stream {stream!r}: the pass hides {sorted(dict(run.mask))}, expected it too"
                )
            if stream not in hidden:
                found[needed] = TokenOutput()
            elif head.config.at == "backbone":
                assert joint is not None
                found[needed] = self._read(head, joint.x[stream], hidden[stream], self.batch.streams[stream])
            else:
                found[needed] = self._read(head, None, hidden[stream], self.batch.streams[stream])
            found[needed].shown = {name: each.shown for name, each in hidden.items()}
        return found

    def fill(self, head: MaskedTokenHead, is_hidden_UL: Tensor) -> TokenOutput:
        """What a head puts at given places of its text, each hidden behind the mask token.

        Args:
            head: for tokens.
            is_hidden_UL: bool, places of the head's stream.

        Raises:
            ConfigError: if the stream's tokenizer has no mask token.
        """
        name = head.config.stream
        stream = self.batch.streams[name]
        choice = TokenChoice.of(self.model.controls.get(name, {}), self._num_ids(name))
        ids_UL = stream.values.masked_fill(is_hidden_UL, choice.mask_id)
        features = self.model.encode(name, replace(stream, values=ids_UL))
        x_SMW = None
        if head.config.at == "backbone":
            x_SMW = self.states(*self.lay_out({**self.features, name: features})).x[name]
        return self._read(head, x_SMW, Hidden(features, is_hidden_UL, stream.values), stream)

    def _read(self, head: MaskedTokenHead, x_SMW: Tensor | None, hidden: Hidden, stream: StreamBatch) -> TokenOutput:
        """Predictions and targets at the hidden places, sample by sample."""
        if x_SMW is None:
            encoder = self.model.streams[head.config.stream].encoder
            assert isinstance(encoder, Encoder)
            x_SMW = by_sample(encoder.normed(hidden.features), stream, self.batch.num_samples)
        is_masked_SM = by_sample(hidden.is_masked_UM, stream, self.batch.num_samples)
        if x_SMW.shape[:2] != is_masked_SM.shape:
            raise ConfigError(
                f"masked modelling of stream {head.config.stream!r}: its connector changes the number of tokens from "
                f"{is_masked_SM.shape[1]} to {x_SMW.shape[1]}; use one that keeps them (identity, linear, mlp)"
            )
        targets_UM = self._patch_targets(head, stream, hidden) if hidden.values_UM is None else hidden.values_UM
        targets_SM = by_sample(targets_UM, stream, self.batch.num_samples)
        samples_K = is_masked_SM.nonzero()[:, 0]
        return TokenOutput(head(x_SMW[is_masked_SM]), targets_SM[is_masked_SM], samples_K)

    @torch.no_grad()
    def _patch_targets(self, head: MaskedTokenHead, stream: StreamBatch, hidden: Hidden) -> Tensor:
        """What the hidden patches held: normalised pixels ``[U, M, P]``, or codes ``[U, M]``."""
        encoder = self.model.streams[head.config.stream].encoder
        assert isinstance(encoder, PatchMasking)
        if head.config.codec is None:
            patches_ULP = normalised_patches(encoder.patches(stream.values))
            return torch.nn.functional.pad(patches_ULP, (0, 0, encoder.first_patch, 0))
        source, codec = self.batch.streams[head.config.codec], self.model.streams[head.config.codec].encoder
        assert isinstance(codec, Encoder)
        codes_UL = codec.codes(source.values, source.lengths)
        num_patches = hidden.is_masked_UM.shape[1] - encoder.first_patch
        if codes_UL.shape[1] != num_patches:
            raise ConfigError(
                f"codec {head.config.codec!r}: gives {codes_UL.shape[1]} codes for {num_patches} patches of stream "
                f"{head.config.stream!r}; make their grids agree"
            )
        return torch.nn.functional.pad(codes_UL, (encoder.first_patch, 0))

    def hide(self, name: str, rate: float, shown: Shown | None = None) -> Hidden:
        """Draw what is hidden of a stream, or hide what was hidden before, and encode it like that.

        Raises:
            ConfigError: if the stream's encoder cannot hide places.
        """
        stream, encoder = self.batch.streams[name], self.model.streams[name].encoder
        if stream.values is None:
            raise ConfigError(f"stream {name!r}: masked modelling needs its inputs; take its encoder out of the cache")
        if isinstance(encoder, PatchMasking):
            grids = encoder.grids(stream.values, stream.lengths)
            num_patches = max(rows * columns for rows, columns in grids)
            is_masked_UL = mask_blocks(grids, rate, num_patches, stream.values.device) if shown is None else shown[1]
            found = encoder.encode_masked(stream.values, stream.lengths, is_masked_UL)
            padded_UM = torch.nn.functional.pad(is_masked_UL, (encoder.first_patch, 0))
            return Hidden(found, padded_UM, shown=(stream.values, is_masked_UL))
        if self.model.config.streams[name].modality != "text":
            raise ConfigError(
                f"stream {name!r}: its encoder has no places that could be hidden; expected text or patches"
            )
        is_valid_UL = valid_mask(stream.lengths, stream.values.shape[1])
        choice = TokenChoice.of(self.model.controls.get(name, {}), self._num_ids(name))
        ids_UL, is_masked_UL = shown or mask_tokens(stream.values, is_valid_UL, rate, choice)
        found = self.model.encode(name, replace(stream, values=ids_UL))
        return Hidden(found, is_masked_UL, stream.values, (ids_UL, is_masked_UL))

    def _num_ids(self, name: str) -> int:
        embedding = getattr(self.model.streams[name].encoder, "token_embed", None)
        assert isinstance(embedding, torch.nn.Embedding)
        return embedding.num_embeddings

    def _caption(self, head: MaskedTokenHead) -> TokenOutput:
        """Each token but the first from those before it and from all other streams."""
        if head.config.at == "queries":
            return QueryRun(self.model, self.batch, self.features).caption(head)
        name = head.config.stream
        if name not in self.batch.streams:
            return TokenOutput()
        check_writes(self.model, head)
        tokens, is_valid = self.lay_out(self.features)
        states = self.states(tokens, is_valid, causal=(name,))
        stream = self.batch.streams[name]
        ids_SM = by_sample(stream.values, stream, self.batch.num_samples)
        is_target = states.is_valid[name][:, 1:] & states.is_valid[name][:, :-1]
        return TokenOutput(head(states.x[name][:, :-1][is_target]), ids_SM[:, 1:][is_target], is_target.nonzero()[:, 0])

    def next_token_logits(self, head: MaskedTokenHead, ids_ST: Tensor, tokens: Tokens, is_valid: Tokens) -> Tensor:
        """What follows texts of one length, as the ``caption`` pass learns it, ``[S, V]``.

        Args:
            head: from :func:`caption_head`.
            ids_ST: int64 ids of the texts, start token included.
            tokens: of the other streams, from :meth:`lay_out`; none of them: the words alone.
            is_valid: likewise.
        """
        name = head.config.stream
        x_STW, valid_ST = self.text_tokens(head, ids_ST)
        states = self.states({**tokens, name: x_STW}, {**is_valid, name: valid_ST}, causal=(name,))
        logits_SV: Tensor = head(states.x[name][:, -1])
        return logits_SV

    def text_tokens(self, head: MaskedTokenHead, ids_ST: Tensor) -> tuple[Tensor, Tensor]:
        """Connected tokens ``[S, T, W]`` of whole texts of a head's stream, and that all are valid ``[S, T]``."""
        stream: Any = self.model.streams[head.config.stream]
        found = stream.encoder(ids_ST, torch.full((len(ids_ST),), ids_ST.shape[1], device=ids_ST.device))
        x_STW, valid_ST = pair = (found.x_UND, found.is_valid_UN)
        if stream.connector is not None:
            x_STW, valid_ST = stream.connector(*pair)
        return x_STW, valid_ST


def token_head(model: MultimodalModel, needed: TokenPass) -> MaskedTokenHead:
    """The head that a pass is for.

    Raises:
        ConfigError: if the model has no such head, or several that fit a pass which names none.
    """
    heads = {name: head for name, head in model.heads.items() if isinstance(head, MaskedTokenHead)}
    if needed.head:
        if needed.head not in heads:
            raise ConfigError(f"found the head {needed.head!r}, expected a masked_token head: {sorted(heads)}")
        return heads[needed.head]
    masked = dict(needed.mask)
    fitting = [head for head in heads.values() if not masked or head.config.stream in masked]
    if len(fitting) != 1:
        raise ConfigError(
            f"found {len(fitting)} masked_token heads for the streams {sorted(masked)}, expected one; "
            f"name it in the objective: head: one of {sorted(heads)}"
        )
    return fitting[0]


def caption_head(model: MultimodalModel) -> MaskedTokenHead:
    """The only head that writes captions.

    Raises:
        ConfigError: if the model has no encoder backbone or no such head, or its text is not written token by token.
    """
    if not isinstance(model.backbone, EncoderBackbone):
        raise ConfigError(
            f"captions: found the backbone {model.config.backbone.use!r}, expected 'encoder' or one that chats"
        )
    writing = [h for h in model.heads.values() if isinstance(h, MaskedTokenHead) and h.config.predicts == "tokens"]
    if len(writing) != 1:
        raise ConfigError(f"captions: found {len(writing)} masked_token heads that predict tokens, expected one")
    check_writes(model, writing[0])
    return writing[0]


def check_writes(model: MultimodalModel, head: MaskedTokenHead) -> None:
    """Prove that the text of a head can be written token by token.

    Raises:
        ConfigError: if its encoder looks ahead, or the head does not read the backbone.
    """
    name = head.config.stream
    if model.config.streams[name].encoder.use != "embedding" or head.config.at != "backbone":
        raise ConfigError(
            f"captions of stream {name!r}: its encoder sees tokens before they are predicted; expected the encoder "
            "'embedding' and a head at the backbone"
        )
