"""The contract of a model: what training, decoding, evaluation, chat, report and tables know of it, and nothing more.

A model is one file with a `ModelConfig` and a `DialogueModel`, and one line in `case_fast.models.MODELS`. It writes ``read``
(what it understands of a context, before a reply is known) and ``forward`` (the losses); decoding follows from the `Reading`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from case_fast import checksums, ops
from case_fast import equations as eq
from case_fast.arguments import at_least_1, check_choices, settle
from case_fast.batch import Batch
from case_fast.errors import CheckpointError, ConfigError
from case_fast.models.layers import AnySeed, DecoderState, refuse_halves, seed_at
from case_fast.models.results import Inside, Output, Reading, Why
from case_fast.ops import transforms
from case_fast.ops.device_flag import raise_pending as raise_pending

POSITIONS = 1024  # places in a sequence whose embeddings are looked up; those of a longer one are computed


@dataclass(frozen=True)
class Length:
    """How long a phase of training is, in steps.

    Attributes:
        steps: at most so many; None: until early stopping.
        validate_every: steps between validations, of which early stopping counts those that are no better; None: there are none,
            and the phase has just as many ``steps``.
        min_steps: before early stopping counts.
        cooldown: of the ``steps`` the last ones, in which the learning rate falls linearly.
    """

    steps: int | None
    validate_every: int | None = None
    min_steps: int = 0
    cooldown: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """What decides the shape and the objective of any model; a model's own settings stand on top of these.

    Attributes:
        vocab_size: words, special tokens included.
        emotions: emotion labels.
        eos_id: the word that ends a reply.
        d_model: width of every module; heads must divide it.
        heads: attention heads.
        layers: of every encoder and decoder.
        ffn: width of the feed-forward nets.
        encoder_dropout: dropout probability.
        decoder_dropout: dropout probability.
    """

    kind: ClassVar[str]  # the model's name in MODELS
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # name of an ablation -> the settings that it changes
    retired: ClassVar[tuple[str, ...]] = ()  # settings of earlier versions that changed nothing in evaluation: read over
    came_later: ClassVar[Mapping[str, Any]] = {}  # settings that earlier versions lacked -> what these did

    vocab_size: int = 24_000
    emotions: int = 32
    eos_id: int = 3
    d_model: int = 300
    heads: int = 2
    layers: int = 1
    ffn: int = 300
    encoder_dropout: float = 0.0
    decoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        settle(self)
        check_choices(self)
        at_least_1(self, "vocab_size", "emotions", "d_model", "heads", "layers", "ffn")
        if self.d_model % self.heads:
            raise ConfigError(f"heads must divide d_model: {self.heads} does not divide {self.d_model}")
        for item in fields(self):
            if item.name.endswith("dropout") and not 0 <= getattr(self, item.name) < 1:
                raise ConfigError(f"{item.name} must be in [0, 1), not {getattr(self, item.name)}")

    def ablated(self, name: str) -> Self:
        """These settings with one of the ablations ("w/o Graph", ...) carried out."""
        if name not in self.ablations:
            known = ", ".join(self.ablations) or f"{self.kind} has none"
            raise ConfigError(f"unknown ablation {name!r}; one of {known}")
        return replace(self, **self.ablations[name])

    @property
    def ablation(self) -> str | None:
        """The ablation that these settings are, "" for the whole model, None for a mixture that has no name."""
        touched = {setting for changed in self.ablations.values() for setting in changed}
        defaults = {item.name: item.default for item in fields(self)}
        changed = {name: getattr(self, name) for name in touched if getattr(self, name) != defaults[name]}
        return next((name for name, row in {"": {}, **self.ablations}.items() if dict(row) == changed), None)

    def length(self, phase: str) -> Length | None:
        """How long a phase of the model's training is; None, by default: as long as the training recipe says."""
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, the model's name first."""
        return {"model": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], saved: bool = False) -> Self:
        """Undo `as_dict`; what is left out keeps its default.

        Args:
            saved: the values are those of a trained model: what they lack is what the version that wrote them did (`came_later`),
                whatever the default is now.

        Raises:
            ConfigError: an unknown setting, or a value that cannot work.
        """
        values = {**cls.came_later, **values} if saved else values
        values = {name: value for name, value in values.items() if name != "model" and name not in cls.retired}
        known = [item.name for item in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ConfigError(f"unknown setting {', '.join(unknown)} of {cls.kind}; there are {', '.join(known)}")
        return cls(**values)


class DialogueModel(nn.Module, PyTorchModelHubMixin, library_name="case_fast", tags=["empathetic-dialogue"]):
    """A model that answers dialogues: ``model(batch)`` takes a packed `Batch`, returns an `Output`; ``.loss.backward()`` trains.

    A subclass makes ``embedding`` (the shared word table), ``decoder`` and ``output`` (d -> words) among its own parts, ends its
    constructor with ``self.finish()``, and writes `read` and `forward`.

    Attributes:
        needs: parts of the `Batch` that it reads.
        title: its name for people; none of its own: that of the class.
        phases: of training, in order; the last one trains the whole objective.
        presets: named changes to the training recipe, the first one the default.
        published: the figures of papers: ablation ("" for the whole model) -> {"source", metric: value}.
        shared: names of the parts that several losses train, where their gradients are to be compared.
        retired: buffers of weights of earlier versions that are read over.
        asks: why a forward pass must ask the device for what a tensor holds; empty where it need not. A step of a model that
            asks cannot be captured, nor what it decodes be replayed.
        balance: what the gate of its `Why` weighs, the two sides by name; None where it has no gate.
        sources: of each memory of its `Reading` what the rows are, in order: "inferences" and "concepts" as the choices of a
            `Why`, "context" [CLS] and the context's words, "emotional" [SEP] and its emotional words.
    """

    Config: ClassVar[type[ModelConfig]]
    needs: ClassVar[tuple[str, ...]] = ("dialogue",)
    title: ClassVar[str] = ""
    phases: ClassVar[tuple[str, ...]] = ("all",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    shared: ClassVar[tuple[str, ...]] = ()
    retired: ClassVar[tuple[str, ...]] = ()
    asks: ClassVar[str] = ""
    balance: ClassVar[tuple[str, str] | None] = None
    sources: tuple[tuple[str, ...], ...] = (("context",),)

    embedding: nn.Embedding
    decoder: nn.Module
    output: nn.Linear
    word_counts: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self._hub_mixin_config = config.as_dict()
        position = eq.sinusoidal_position(torch.arange(POSITIONS), config.d_model)
        self.register_buffer("position_table", position, persistent=False)
        self.position_table: Tensor
        self.phase, self.turn = self.phases[-1], ""
        self._frozen: list[nn.Parameter] = []

    def finish(self) -> None:
        """Initialise the weights, and freeze what the settings leave without any use."""
        self._initialize()
        for part in self.switched_off():
            part.requires_grad_(False)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)

    def __call__(self, *arguments: Any, **named: Any) -> Output:
        """As any module's; what torch refuses under one of its transforms names the model and the transform."""
        if torch.compiler.is_compiling():
            return super().__call__(*arguments, **named)
        with transforms.named(f"the model {self.config.kind}"):
            return super().__call__(*arguments, **named)

    # ---- what a model writes

    def forward(self, batch: Batch) -> Output:
        """Losses of a batch whose replies and emotions are known."""
        raise NotImplementedError

    def read(self, batch: Batch) -> Reading:
        """Everything up to the decoder; needs no reply and no emotion."""
        raise NotImplementedError

    def explain(self, batch: Batch, reading: Reading, posterior: bool = False) -> Why:
        """Its reasons, from a batch's `Reading`; by default the emotion alone. ``posterior``: of the choices too, where the model
        has one, from the batch's own replies."""
        return Why(emotion=None if reading.emotion_logits is None else reading.emotion_logits.exp())

    def with_gate(self, batch: Batch, reading: Reading, gate: Tensor) -> Reading:
        """The reading with other gates (B,) and all that follows from them; of models that have a ``balance``."""
        raise NotImplementedError

    def inside(self, batch: Batch, output: Output) -> Inside:
        """What `case_fast.diagnosis` looks at, from the `Output` of a batch with the whole objective; by default nothing."""
        return Inside()

    def switched_off(self) -> Iterable[nn.Module | nn.Parameter]:
        """Parts that the settings leave without any use."""
        return ()

    def unreached(self, phase: str) -> Iterable[nn.Module | nn.Parameter]:
        """Parts that the loss of a phase does not reach."""
        return ()

    # ---- phases

    def set_phase(self, name: str) -> None:
        """Train this phase's loss: parameters that it does not reach are frozen, those of the phase before are trained again."""
        if name not in self.phases:
            raise ConfigError(f"{self.config.kind} has no phase {name!r}; it has {', '.join(self.phases)}")
        self.phase = name
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        for part in self.unreached(name):
            for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
                if parameter.requires_grad:
                    self._frozen.append(parameter.requires_grad_(False))

    def set_turn(self, step: int) -> None:
        """Train what step ``step`` of the phase, from 0, has to: where its steps take turns, ``turn`` names whose it is. By
        default they do not."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained in any phase, as groups of an optimizer; one with an "lr" keeps it, the others follow the recipe."""
        now_frozen = set(map(id, self._frozen))
        return [{"params": [p for p in self.parameters() if p.requires_grad or id(p) in now_frozen]}]

    # ---- words

    def look_up(self, words: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scaled rows of the shared table for several lists of words by name.

        One lookup for all of them: the backward of each lookup fills a gradient as large as the table.

        Raises:
            ConfigError: the model's weights are of half precision, in which losses and Adam lose what they would learn from.
        """
        refuse_halves(self.config.kind, self.embedding.weight)
        rows = eq.take(self.embedding.weight, torch.cat([*words.values()])) * self.config.d_model**0.5
        return dict(zip(words, rows.split([len(ids) for ids in words.values()]), strict=True))

    def place(self, rows: Tensor, position: Tensor, longest: int) -> Tensor:
        """word * sqrt(d) + sinusoidal position, (n, d); position (n,), all of them below ``longest``."""
        return rows + self.positions(position, longest, rows.dtype)

    def positions(self, position: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        """(n, d) embeddings of places ``position`` (n,), all of them below ``longest``."""
        if longest > POSITIONS or dtype == torch.float64:  # the table has the digits of float32
            return eq.sinusoidal_position(position, self.config.d_model, dtype)
        return eq.take(self.position_table, position).to(dtype)

    def load_embeddings(self, ids: Tensor, vectors: Tensor) -> None:
        """Put pretrained vectors (n, d) at the words ``ids`` (n,) of the shared table; the other words keep theirs."""
        if vectors.dim() != 2 or vectors.shape[1] != self.config.d_model:
            raise ValueError(f"vectors must be (n, {self.config.d_model}), not {tuple(vectors.shape)}")
        with torch.no_grad():
            self.embedding.weight[ids.long()] = vectors.to(self.embedding.weight)

    # ---- the decoder over whole replies

    def decode(self, rows: Tensor, cu: Tensor, reading: Reading, position: Tensor, longest: int, seed: AnySeed = 0) -> Tensor:
        """(M, d) hidden states of packed decoder inputs: rows (M, d) are their scaled words, cu (B + 1,), position (M,) below
        ``longest``."""
        if reading.start is not None:
            rows = rows.index_copy(0, cu[:-1], reading.start.to(rows.dtype))
        return self.decoder(self.place(rows, position, longest), cu, reading.memories, seed=seed, watched=reading.watched,
                            **self.beside_memories(reading))

    def beside_memories(self, reading: Reading) -> dict[str, Tensor | None]:
        """What the decoder takes of a `Reading` beside its memories and its first input, by the decoder's names."""
        return {"added": reading.added}

    def decode_replies(self, batch: Batch, rows: Tensor, reading: Reading) -> Tensor:
        """`decode` of a batch's own replies, with dropout by its seed; rows (M, d): its scaled decoder inputs."""
        seed = seed_at(batch.seed, "decoder")
        return self.decode(rows, batch.cu_target, reading, batch.target_position, batch.longest, seed)

    def word_losses(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) -log P of the words ``target`` (M,) after hidden states (M, d), and the most probable words (M,)."""
        return ops.linear_cross_entropy(hidden, self.output.weight, self.output.bias, target)

    def count_words(self) -> None:
        """Give the model the running counts of its own words that `diversity_loss` weighs words by: a buffer, saved with it."""
        self.register_buffer("word_counts", torch.zeros(self.config.vocab_size, dtype=torch.int64))

    def diversity_loss(self, batch: Batch, nll: Tensor, prediction: Tensor) -> Tensor:
        """L_div of Sabour et al. (2022); in training the most probable words (EOS aside) are counted first."""
        if self.training:
            said = ((prediction != self.config.eos_id) & (batch.target_weight > 0)).to(self.word_counts.dtype)
            self.word_counts.add_(batch.total(torch.zeros_like(self.word_counts).index_add_(0, prediction, said)))
        return eq.diversity_loss(nll, batch.target, eq.diversity_weights(self.word_counts), batch.target_weight)

    def reply_logits(self, words: Tensor, cu: Tensor, reading: Reading, last_only: bool = False) -> Tensor:
        """(M, V) scores of the word after each of packed decoder inputs (M,), cu (B + 1,): the decoder without a cache.

        ``last_only``: (B, V), after the last of each sequence alone.
        """
        hidden = self._reply(words, cu, reading)
        return eq.full_precision(self.output(eq.take(hidden, cu[1:] - 1) if last_only else hidden))

    def reply_nll(self, words: Tensor, cu: Tensor, reading: Reading, target: Tensor) -> Tensor:
        """(M,) -log P of the words ``target`` (M,) after each of packed decoder inputs, as `reply_logits` scores them."""
        return self.word_losses(self._reply(words, cu, reading), target)[0]

    def source_attention(self, words: Tensor, reading: Reading) -> list[Tensor]:
        """How much the decoder's last layer reads each row of each memory for the word after each of one dialogue's decoder
        inputs (M,): (M, S) of a memory of S rows, see `equations.source_attention`."""
        cu = torch.tensor([0, len(words)], device=words.device)
        watched: list[Tensor] = []
        self._reply(words, cu, replace(reading, watched=watched))
        (rows,), found = watched, []
        for source in self.decoder.layers[-1].sources(reading.memories):
            found.append(eq.source_attention(rows, source))
            rows = eq.cross_attention(rows, cu, [source])
        return found

    def _reply(self, words: Tensor, cu: Tensor, reading: Reading) -> Tensor:
        rows, position = self.embedding(words) * self.config.d_model**0.5, eq.segment_positions(cu, len(words))
        return self.decode(rows, cu, reading, position, len(words))

    # ---- decoding, one word at a time (case_fast.generation drives it)

    def start_decoding(self, reading: Reading, beams: int = 1, words: int = 30, fixed: bool = False) -> DecoderState:
        """A state for at most ``words`` words a reply; ``fixed``: in memory that `restart_decoding` takes again."""
        state = self.decoder.start(reading.memories, beams, words, reading.start, fixed=fixed, **self.beside_memories(reading))
        state.places = self.positions(torch.arange(words, device=reading.device), words, reading.memories[0].rows.dtype)
        return state

    def restart_decoding(self, state: DecoderState, reading: Reading) -> bool:
        """Start anew with another batch in the memory of a fixed state; False where it has no room for it."""
        return self.decoder.restart(state, reading.memories, reading.start, **self.beside_memories(reading))

    def next_word_logits(self, words: Tensor, state: DecoderState) -> Tensor:
        """(n, V) scores of the next word, given the newest words (n,) of the n hypotheses in ``state``, first of all BOS."""
        return eq.full_precision(self.output(self._decode_step(words, state)))

    def next_words(self, words: Tensor, state: DecoderState, k: int, penalty: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k most probable next words and their log-probabilities, (n, k) each; ``penalty`` (V,) is added to the scores: -inf
        where a word may not be said.

        The scores are those of `next_word_logits`; log-probabilities come first, the best and then the lowest word first.
        """
        hidden, bias = self._decode_step(words, state), self.output.bias
        return ops.top_words(hidden, self.output.weight, bias if penalty is None else bias + penalty, k)

    def _decode_step(self, words: Tensor, state: DecoderState) -> Tensor:
        rows = self.embedding(words) * self.config.d_model**0.5
        if state.start is not None:
            rows = torch.where(state.position == 0, state.of_hypotheses(state.start).to(rows.dtype), rows)
        return self.decoder.step(rows + state.next_place(), state)

    # ---- weights on disk

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:
        """As of `huggingface_hub.PyTorchModelHubMixin`: a folder for `from_pretrained`, with checksums that loading checks."""
        (Path(save_directory) / checksums.NAME).unlink(missing_ok=True)  # it is about what goes
        made = super().save_pretrained(save_directory, **options)
        checksums.write(Path(save_directory))
        return made

    @classmethod
    def from_pretrained(cls, folder: str | Path, map_location: str = "cpu") -> Self:
        """The model that `save_pretrained` wrote into ``folder``, in evaluation mode, on the device ``map_location``.

        Folders only, where the mixin would ask the network for any path that does not exist: fetch a model from the hub
        first, with ``huggingface_hub.snapshot_download``. Strict: all weights and settings must be there and fit.

        Raises:
            CheckpointError: a part is missing, damaged, or not of this model.
        """
        folder = Path(folder)
        config = read_config(folder)
        if (found := config.get("model", "case")) != cls.Config.kind:
            remedy = "case_fast.models.load opens any of them"
            raise CheckpointError(f"{folder} holds the model {found}, not {cls.Config.kind}: {remedy}")
        try:
            model = cls(cls.Config.from_dict(config, saved=True))
            model.load_weights(folder / "model.safetensors")
        except (ValueError, TypeError) as error:
            raise _not_of_this_model(folder, error) from error
        return model.to(map_location).eval()

    def load_weights(self, path: str | Path, listed_in: str = checksums.NAME) -> None:
        """Load a safetensors file of this model's weights, all of them and no others.

        Args:
            listed_in: the file beside it that has its checksum.

        Raises:
            CheckpointError: it is missing, damaged, or not of this model.
        """
        try:
            checksums.check(Path(path), listed_in)
            self.load_tensors(load_file(path))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _not_of_this_model(Path(path).parent, error) from error

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Strict `load_state_dict`: every name, shape and dtype must agree, or `CheckpointError` says which does not.

        Returns:
            the names that were read over, since they are `retired`.
        """
        expected = self.state_dict()
        given = {name: x for name, x in tensors.items() if name not in self.retired}
        wrong = [f"{name} is missing" for name in expected if name not in given]
        wrong += [f"{name} is unknown" for name in given if name not in expected]
        wrong += [
            f"{name} is {given[name].dtype} {tuple(given[name].shape)}, expected {own.dtype} {tuple(own.shape)}"
            for name, own in expected.items()
            if name in given and (given[name].shape != own.shape or given[name].dtype != own.dtype)
        ]
        if wrong:
            raise CheckpointError(f"the weights do not fit the model: {'; '.join(wrong[:5])}")
        self.load_state_dict(given)
        return [name for name in tensors if name in self.retired]


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in FOLDER/config.json, the model's name among them (absent: case); `CheckpointError` if there are none."""
    try:
        checksums.check(folder / "config.json")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.json holds no JSON object")
        return config
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_of_this_model(folder, error) from error


def _not_of_this_model(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder}: missing, damaged or not of this model ({error}). Give a folder that save_pretrained wrote")


def no_autocast(like: Tensor) -> AbstractContextManager[None]:
    """Softmax, KL and the MIM sums run in float32 under autocast."""
    return torch.autocast(like.device.type, enabled=False)


@contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """No dropout inside, and no gradients unless they are asked for; the model's mode is restored after."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(not gradients):
            yield
    finally:
        model.train(training)
