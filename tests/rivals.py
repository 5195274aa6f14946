"""The same weights and work in transformers and TRL, for tests/bench.py alone."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

from model import Transformer, save_pretrained


def in_transformers(model: Transformer):
    """Return the same weights in transformers, or None if it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(model, directory)
        rival = AutoModelForCausalLM.from_pretrained(directory, dtype=model.head.dtype)
    return rival.to(model.head.device).eval()


def trl_trainer(model: Transformer, prompts: Sequence[Sequence[int]], samples: int, new: int,
                learning_rate: float, steps: int):
    """Return TRL's GRPOTrainer with the same weights; raise ImportError if it is not installed.

    Each token id is a word, so text and tokens are one, and token 0 ends a completion. The settings
    are the fastest on a CPU that were found. Its log-probabilities come in chunks by default
    (1.16); use_transformers_continuous_batching runs too, but a step of 4 x 16 tokens that takes
    2 s without it took 39 s.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    vocabulary = {f"t{i}": i for i in range(model.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t1")
    rows = Dataset.from_list([{"prompt": " ".join(f"t{i}" for i in prompt)} for prompt in prompts])
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, num_generations=samples,
        per_device_train_batch_size=len(prompts) * samples, max_completion_length=new,
        learning_rate=learning_rate, beta=0.0, temperature=1.0, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True)
    rewards = itertools.cycle((0.0, 1.0))
    return GRPOTrainer(in_transformers(model),
                       lambda completions, **_: [next(rewards) for _ in completions], config, rows,
                       processing_class=tokenizer)


def trl_steps(trainer, ours: Callable[[], object]) -> dict[str, float]:
    """Run the trainer and our step in turns; return the median seconds of each but the first."""
    from transformers import TrainerCallback
    seconds = {"ours": [], "TRL": []}

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            between = time.perf_counter()
            ours()
            seconds["TRL"].append(between - self.begin)
            seconds["ours"].append(time.perf_counter() - between)
    trainer.add_callback(Turns())
    trainer.train()
    return {who: statistics.median(times[1:]) for who, times in seconds.items()}
