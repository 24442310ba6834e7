"""What people ask about memory and time: what fits, how long, why runs differ, what failed, and a trainer's file."""
