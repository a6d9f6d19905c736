"""Generate a checkpoint's answers to held-out rows, in batches, and score them against the rows' own.

Every assistant turn is a question, asked after the row's earlier turns with their reference answers. Batch by batch,
--output gets one JSON line a question, in the order of the file; `<output>.summary.json` gets the share of:

- exact_match: answer and reference agree but for case, blanks at the ends and one full stop at the end
- exact_match_strict: they agree but for blanks at the ends
- stopped: the model ended the answer itself; the others were cut at --max_new_tokens
- scienceqa: of the references that are an option letter, A to E, those whose answer names it. The letter is read as
  LLaVA's eval_science_qa.py reads it; an answer without a readable one is wrong
- scienceqa_image (LLaVA's IMG-Accuracy): of these, the questions with a picture

    python recipes/evaluate.py --model outputs/llava-sft --dataset_name data/test.json --output outputs/answers.jsonl
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import rich
from jinja2 import TemplateError
from rich.progress import track

from _answers import MEASURES, add_arguments, answer, load_checkpoint, load_processor, make_table, score, summarise
from collators import fetch_image, load_rows, read_row, rendered_placement


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=8, help="questions")
    parser.add_argument("--dataset_name", required=True, help="LLaVA JSON, or what else collators.load_rows takes")
    parser.add_argument("--dataset_test_split", default="test", help="the split to ask, if --dataset_name has several")
    parser.add_argument("--image_folder", help="where relative picture paths start; default: the JSON file's folder")
    parser.add_argument("--allow_external_images", action="store_true", help="accept pictures outside of that folder")
    parser.add_argument("--placement", choices=["front", "keep"], help="default: as the checkpoint's template does")
    parser.add_argument("--limit", type=int, help="take the first rows only")
    parser.add_argument("--output", default="answers.jsonl", help="one JSON line a question")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    parser.add_argument("--group_by", help="column to split the scores by; default: source, else category, if any")
    return parser


def read_questions(rows, columns, image_token, placement):
    """Yield (messages up to the question, their images, its record) for every assistant turn of every row."""
    for index, row in enumerate(rows):
        conversation = read_row(row, image_token, placement=placement, index=index)
        messages, images = conversation["messages"], conversation["images"]
        mark = image_token if placement == "keep" else ""
        texts = ["".join(part.get("text", mark) for part in message["content"]).strip() for message in messages]
        places = [sum(part["type"] == "image" for part in message["content"]) for message in messages]
        ends = [end for end, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, end in enumerate(ends):
            shown = images[: sum(places[:end])]
            record = {
                "id": index if row.get("id") is None else row["id"],
                "turn": turn,
                **{column: row[column] for column in columns},
                "question": texts[end - 1],
                "reference": texts[end],
                "images": [image["path"] if isinstance(image, dict) else image for image in shown],
            }
            yield messages[:end], shown, record


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1) or args.temperature < 0:
        found = f"--batch_size {args.batch_size}, --limit {args.limit}, --temperature {args.temperature}"
        raise ValueError(f"{found}: expected at least 1 row, 1 question, and a temperature of 0 or more")
    if args.group_by in ("turn", "question", "reference", "images", "answer", "stopped", *MEASURES):
        raise ValueError(f"--group_by {args.group_by}: a record's own field; rename that column of the data")
    output, summary_file = Path(args.output), Path(f"{args.output}.summary.json")
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists: pass another --output, or --overwrite to replace it")
    placement = args.placement or rendered_placement(load_processor(args.model)) or "front"
    options = {name: getattr(args, name) for name in ("image_folder", "allow_external_images", "allow_remote_images")}
    rows = load_rows(args.dataset_name, split=args.dataset_test_split, placement=placement, **options)
    rows = rows.select(range(len(rows))[: args.limit])
    columns = [column for column in (args.group_by, "source", "category") if column in rows.column_names]
    if args.group_by and args.group_by not in columns:
        raise ValueError(f"--group_by {args.group_by}: {args.dataset_name} has the columns {rows.column_names}")
    model, processor = load_checkpoint(args.model, args.dtype, args.device, args.allow_pickled_weights)
    generation = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "num_beams")}
    generation["fetch_image"] = fetch_image if args.allow_remote_images else None
    questions = read_questions(track(rows, "rows"), columns, processor.image_token, placement)
    records = []
    output.parent.mkdir(parents=True, exist_ok=True)
    summary_file.unlink(missing_ok=True)
    with output.open("w", encoding="utf-8") as file:
        while batch := list(islice(questions, args.batch_size)):
            conversations, images, asked = map(list, zip(*batch, strict=True))
            try:
                answers = answer(model, processor, conversations, images, **generation)
            except (OSError, ValueError, TemplateError) as error:
                error.add_note(f"{args.dataset_name}: in the batch of rows {[record['id'] for record in asked]}")
                raise
            for record, (text, stopped) in zip(asked, answers, strict=True):
                record |= {"answer": text, "stopped": stopped, **score(text, record["reference"], record["images"])}
                print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            records += asked

    summary = summarise(records, columns[0] if columns else None) | {"settings": vars(args) | {"placement": placement}}
    summary_file.write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    rich.print(make_table(summary))


if __name__ == "__main__":
    main()
