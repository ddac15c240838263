"""`make bench`: how long roll-outs take on the lab, beside what is least possible and beside Ansible.

meter       runs commands and accounts for their time, CPU and memory; a process of its own
measuring   the same from here: one sample, a series of samples
labhosts    the lab's hosts: made new, their CPU time, the ssh sessions that they saw
ours        this project's roll-out, and the floor under it
ansible     the same state as an Ansible playbook (bench/playbook), in three configurations
results     what was measured, as JSON; medians, ratios, goals
report      the tables of docs/benchmarks.md
chart       its picture
"""


class BenchError(Exception):
    """What went wrong, in lines for a person."""
