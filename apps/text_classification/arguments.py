"""The command line. Imports nothing heavy, so that --help and typing mistakes are answered at once."""

from __future__ import annotations

from apps.common.arguments import Parser, count
from apps.common.finetune import arguments as shared

TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
EXAMPLES = """examples:
  dense   accelerate launch apps/text_classification/train_prune.py --task_name mrpc \\
              --model_name_or_path bert-base-uncased --output_dir runs/mrpc/dense
  prune   accelerate launch apps/text_classification/train_prune.py --task_name mrpc \\
              --model_name_or_path runs/mrpc/dense --output_dir runs/mrpc/sparse --do_prune --dist_loss kl
  files   ... --train_file train.csv --validation_file validation.csv   (columns: text, or two of them, and label)
  resume  ... --resume_from_checkpoint runs/mrpc/sparse/step_500
  2 ranks accelerate launch --multi_gpu --num_processes 2 ...; on the CPU
          ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 ...
without data and model it trains a tiny BERT on made-up film reviews: about two minutes
"""


def parser() -> Parser:
    """Every option once."""
    made = Parser(description="Train, prune and distil a Transformers model for text classification.", epilog=EXAMPLES)
    made.gone = shared.GONE
    shared.add_model(made)
    data = made.add_argument_group("data")
    data.add_argument(
        "--task_name", type=str.lower, choices=TASKS, help="one of GLUE's nine, from the hub or the files"
    )
    data.add_argument("--train_file", help="csv, json or parquet: one or two text columns, and label")
    data.add_argument("--validation_file", help="the same columns")
    data.add_argument("--validation_mismatched_file", help="mnli: the second one")
    data.add_argument("--max_length", type=count(2), default=128, help="tokens; what is longer is cut (128)")
    shared.add_rows(data)
    shared.add_pruning(made)
    shared.add_training(made)
    shared.add_output(made, "text_classification")
    return made
