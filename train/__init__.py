"""Shards in, a trained student out. Nothing here reads a command line.

A folder imports only what stands before it:

    errors, config, engine_config, environment_file, run_folder, versions, text_files
    models, data, distributed, lamb     data asks models for the tokenizer's place; lamb imports nothing of this project
    engine_check, optimizer             what DeepSpeed itself refuses of its JSON; LAMB or AdamW, bound to its engine
    objective                           student and teacher, masked batches -> loss
    evaluation, checkpointing, export, finetuning
    loop                                the steps, and what happens between them
    build, run                          a configuration -> all parts of a run -> its run folder
"""
