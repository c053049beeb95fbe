"""One compaction, from the plan to the slots that are swapped in."""
