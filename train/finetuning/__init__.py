"""From an encoder to its scores: GLUE, IMDb, SQuAD and one's own tasks, fine-tuned with transformers' Trainer.

tasks.py           the table of tasks: where the data lies, labels, metrics, the papers' hyper-parameters
settings.py        what a run of one task is made of (Job), resolved
data/              files and the hub -> columns -> texts and labels; own.py: files -> a row of the table
batches.py         texts -> token ids -> batches
runs.py            tasks x seeds: skips what is finished, goes on with what was killed, writes scores.json
task_runner.py     one task made ready for all seeds: classification.py (labels), tagging.py (of words), squad/ (spans)
training.py        one call of transformers' Trainer: progress, checkpoints, stop
soft_labels.py     task distillation: teachers' outputs, and the loss that learns from them
embeddings.py      vectors as they stand: similarity, retrieval
results.py         scores.json: write, read, median and spread, macro average
"""
