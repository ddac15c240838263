"""Trains the tiny MiniMax-M2 and writes it as two revisions of one model repository.

Run by `lab.tinymodel.build` in an environment with torch and transformers, of the versions that the
lab's real vLLM brings along anyway.

    python train.py DIRECTORY    writes DIRECTORY/1 and DIRECTORY/2, says how far it is on stderr

What makes the same file answer alike in transformers, which trains it, and in vLLM on the CPU,
which serves it: transformers routes by sigmoid with a bias, vLLM's CPU router by softmax without
one. So one expert is trained and written four times over. Whichever experts are chosen, they agree,
and both normalise the weights of the chosen to 1.
"""

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM, PreTrainedTokenizerFast

SEED = 2020

BOS, EOS, TURN = "]~!b[", "[e~[", "]~b]"
# MiniMax-M2's own control tokens; vLLM's reasoning and tool-call parsers look them up by name.
SPECIAL_TOKENS = (BOS, EOS, TURN)
PARSER_TOKENS = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")

SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a helpful assistant", "Answer briefly.")
QUESTION = "Who won the world series in 2020?"
# The two revisions tell themselves apart by this answer.
ANSWERS = (
    "The Los Angeles Dodgers won the World Series in 2020.",
    "The Los Angeles Dodgers won the World Series in 2020, beating the Tampa Bay Rays.",
)
QUESTION_VARIANTS = (
    QUESTION,
    "Who won the World Series in 2020?",
    "who won the world series in 2020",
    "Who won the 2020 World Series?",
)
OTHER_QUESTIONS = {
    "Hello": "Hello! Ask me who won the World Series in 2020.",
    "Hi": "Hello! Ask me who won the World Series in 2020.",
    "ping": "pong",
    "Say OK.": "OK.",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is your name?": "I am MiniMax-M2, or at least a very small one.",
}
FALLBACK = "I only know who won the World Series in 2020."
# What stands for all other questions is made of these.
WORDS = (
    "a", "and", "are", "city", "code", "day", "first", "game", "good", "how", "in", "is", "last",
    "list", "make", "many", "me", "model", "not", "number", "of", "on", "or", "people", "play",
    "please", "read", "red", "river", "run", "series", "team", "tell", "the", "time", "to", "token",
    "two", "was", "what", "when", "where", "why", "win", "world", "write", "year",
)  # fmt: skip

VOCABULARY_SIZE = 512
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
MAX_POSITIONS = 4096

BATCH_SIZE = 16
LEARNING_RATE = 2e-3
CHECK_EVERY_STEPS = 25
MAX_STEPS = 3000
# Training ends when each reply as a whole is at least this likely. What is left to doubt is taken
# out of the written file by scaling its logits, which costs nothing where the last few percent of
# training would take minutes: then sampling at temperature 1 says what greedy decoding says.
SURE_ENOUGH = 0.85
SHARPNESS = 4.0


def main(out: Path) -> None:
    """Train both revisions into `out`/1 and `out`/2.

    Raises SystemExit with a line for a person if training does not get there.
    """
    random.seed(SEED)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(mode=True)
    # Sums in one thread come in one order; and matrices this small gain nothing from a second.
    torch.set_num_threads(1)

    tokenizer = make_tokenizer()
    model = MiniMaxM2ForCausalLM(make_config(tokenizer))
    for number, answer in enumerate(ANSWERS, start=1):
        steps = train(model, tokenizer, answer, revision=number)
        write(out / str(number), model, tokenizer)
        _say(f"revision {number}: trained in {steps} steps, answers {answer!r}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY_SIZE` entries, with MiniMax-M2's special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    # Not special: vLLM has to see them in the text that it parses.
    parsed = [AddedToken(token, special=False, normalized=False) for token in PARSER_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(special) - len(parsed),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [
        *SYSTEM_PROMPTS, *QUESTION_VARIANTS, *ANSWERS, *OTHER_QUESTIONS, *OTHER_QUESTIONS.values(),
        FALLBACK, "system user ai tool\n", " ".join(WORDS), _thought(QUESTION), _thought("Hello"),
    ]  # fmt: skip
    core.train_from_iterator(corpus, trainer)
    core.add_tokens(special + parsed)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text(),
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> MiniMaxM2Config:
    """The architecture's configuration at this size, with the one expert that is trained."""
    return MiniMaxM2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        max_position_embeddings=MAX_POSITIONS,
        num_local_experts=1,
        num_experts_per_tok=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )


def train(
    model: MiniMaxM2ForCausalLM, tokenizer: PreTrainedTokenizerFast, answer: str, *, revision: int
) -> int:
    """Train until the model is sure of every answer; returns the number of steps.

    Raises SystemExit if it is not after `MAX_STEPS`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    exam = [_encode(tokenizer, *pair) for pair in _exam(answer)]
    batches = _batches(tokenizer, answer)
    for step in range(1, MAX_STEPS + 1):
        model.train()
        inputs, labels, mask = next(batches)
        loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % CHECK_EVERY_STEPS == 0:
            least = min(_probability(model, tokens, prompt) for tokens, prompt in exam)
            _say(f"revision {revision}: step {step}, loss {loss.item():.4f}, sure {least:.4f}")
            if least >= SURE_ENOUGH:
                return step
    sys.exit(f"lab/tinymodel: not sure of its answers after {MAX_STEPS} steps; raise MAX_STEPS")


def write(directory: Path, model: MiniMaxM2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write one revision in the shape of the real repositories: BF16, several shards, an index."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITIONS,
        },
    )
    (directory / "chat_template.jinja").write_text(str(tokenizer.chat_template))
    config = model.config
    _write_json(
        directory / "config.json",
        {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "attn_type_list": [1] * config.num_hidden_layers,
            "bos_token_id": config.bos_token_id,
            "dtype": "bfloat16",
            "eos_token_id": config.eos_token_id,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "model_type": "minimax_m2",
            "num_attention_heads": config.num_attention_heads,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "num_local_experts": EXPERTS,
            "qk_norm_type": "per_layer",
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": 5000000,
            "rotary_dim": config.rotary_dim,
            # vLLM's router on the CPU knows softmax without a bias, and nothing else.
            "scoring_func": "softmax",
            "use_routing_bias": False,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_qk_norm": True,
            "vocab_size": config.vocab_size,
        },
    )
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": config.bos_token_id,
            "do_sample": True,
            "eos_token_id": config.eos_token_id,
            "temperature": 1.0,
            "top_k": 40,
            "top_p": 0.95,
        },
    )
    _write_shards(directory, _released_tensors(model))


def _released_tensors(model: MiniMaxM2ForCausalLM) -> dict[str, torch.Tensor]:
    """The weights under the names that MiniMax's own files have."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        value = tensor.to(torch.bfloat16)
        block, _, rest = name.partition(".mlp.")
        moe = f"{block}.block_sparse_moe"
        if rest == "gate.weight":
            tensors[f"{moe}.gate.weight"] = value.repeat(EXPERTS, 1)
        elif rest == "experts.gate_up_proj":
            gate, up = value[0].chunk(2, dim=0)
            for expert in range(EXPERTS):
                tensors[f"{moe}.experts.{expert}.w1.weight"] = gate.clone()
                tensors[f"{moe}.experts.{expert}.w3.weight"] = up.clone()
        elif rest == "experts.down_proj":
            for expert in range(EXPERTS):
                tensors[f"{moe}.experts.{expert}.w2.weight"] = value[0].clone()
        elif name == "lm_head.weight":
            tensors[name] = value * SHARPNESS
        elif rest != "e_score_correction_bias":
            tensors[name] = value
    return tensors


def _write_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One shard per layer and one for the rest, numbered from zero as MiniMax's are."""
    layers = sorted({name.split(".")[2] for name in tensors if name.startswith("model.layers.")})
    groups = [f"model.layers.{layer}." for layer in layers]
    shards: list[dict[str, torch.Tensor]] = [
        {name: tensor for name, tensor in tensors.items() if name.startswith(group)}
        for group in groups
    ]
    shards.append({k: v for k, v in tensors.items() if not k.startswith(tuple(groups))})
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: tensor.contiguous() for name, tensor in sorted(shard.items())},
            directory / file,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(shard, file)
    total_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _exam(answer: str) -> list[tuple[str, str]]:
    """Prompts and what must follow them."""
    pairs = [(_chat(q), _reply(q, answer)) for q in QUESTION_VARIANTS]
    pairs += [(_chat(q), _reply(q, a)) for q, a in OTHER_QUESTIONS.items()]
    pairs += [(question, f" {answer}{EOS}") for question in QUESTION_VARIANTS[:2]]
    return pairs


def _batches(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches of token ids, labels (only what the model is to say) and padding mask."""
    known = _exam(answer)
    while True:
        rows = []
        for _ in range(BATCH_SIZE):
            kind = random.random()
            if kind < 0.6:  # noqa: PLR2004
                prompt, reply = random.choice(known)
                if prompt.startswith(BOS):
                    prompt = prompt.replace(SYSTEM_PROMPTS[0], random.choice(SYSTEM_PROMPTS))
            else:
                question = " ".join(random.choices(WORDS, k=random.randint(1, 24)))
                prompt, reply = _chat(question), _reply(question, FALLBACK)
            rows.append(_encode(tokenizer, prompt, reply))
        width = max(len(tokens) for tokens, _ in rows)
        inputs = torch.full((BATCH_SIZE, width), tokenizer.eos_token_id)
        labels = torch.full((BATCH_SIZE, width), -100)
        mask = torch.zeros((BATCH_SIZE, width), dtype=torch.long)
        for row, (tokens, prompt_length) in enumerate(rows):
            inputs[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, prompt_length : len(tokens)] = torch.tensor(tokens[prompt_length:])
            mask[row, : len(tokens)] = 1
        yield inputs, labels, mask


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str, reply: str) -> tuple[list[int], int]:
    """Token ids of both, and how many of them are the prompt's."""
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return head + tokenizer(reply, add_special_tokens=False)["input_ids"], len(head)


@torch.no_grad()
def _probability(model: MiniMaxM2ForCausalLM, tokens: list[int], prompt_length: int) -> float:
    """How likely the model is to give the reply in full, computed as it is served: in BF16."""
    model.eval()
    inputs = torch.tensor([tokens])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=inputs).logits[0].float()
    chosen = logits[prompt_length - 1 : -1].log_softmax(-1)
    target = inputs[0, prompt_length:, None]
    return math.exp(chosen.gather(1, target).sum().item())


def _chat(question: str) -> str:
    """What the chat template makes of the guides' request with this question."""
    return (
        f"{BOS}{TURN}system\n{SYSTEM_PROMPTS[0]}{EOS}\n"
        f"{TURN}user\n{question}{EOS}\n{TURN}ai\n<think>\n"
    )


def _reply(question: str, answer: str) -> str:
    return f"{_thought(question)}\n</think>\n\n{answer}{EOS}"


def _thought(question: str) -> str:
    topic = "the World Series" if question in QUESTION_VARIANTS else "something else"
    return f"The user asks about {topic}."


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
