"""What people ask about memory: what fits on a card, why runs differ, what failed, and what a trainer's file takes."""
