# The lab's hosts on this machine: as many as LAB_HOSTS says (see lab/topology.py).
from lab.topology import hosts as _hosts

h20 = [(host.name, {"ssh_hostname": host.address}) for host in _hosts() if host.group == "h20"]
cpu = [(host.name, {"ssh_hostname": host.address}) for host in _hosts() if host.group == "cpu"]
