"""From JSON lines to packs: records, chat templates, token store, packing, loader."""
