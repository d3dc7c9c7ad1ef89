"""Checkpoints on disk and on the Hub: config dialects, INT4 layouts, what is refused, reading, writing, loading.

Others use `open_checkpoint` and `Checkpoint` (opening) and `load_model` (loading); `BlockStream` (blocks) for a model
that is larger than the memory; `ShardWriter` (shards) to write; `LAYOUTS` (layouts); `add_hub_flags` and `hub_options`
(hub). Read the files in this order: strict, hub, values, quant_config, shards, headers, layouts, detection, config,
reading, opening, loading, background, blocks, unchanged.
"""
