"""Claims about LoRA and its relatives: a ledger of statements, checks that measure, rules that decide."""
