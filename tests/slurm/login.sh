# First process of the login host: makes the cluster's network and private folders, then runs its central daemons.
# Usage: bash -eu login.sh BASE. Ready when /run/ready exists; ends only with the cluster.
base=$1
hostname login
mount -t tmpfs -o mode=755 run /run
mkdir -m 755 /run/munge /run/slurmctld /run/slurmd
mount --bind "$base/etc/slurm" /etc/slurm
mount --bind "$base/etc/hosts" /etc/hosts

ip link set lo up
ip link add br0 type bridge
ip address add 10.0.0.254/24 dev br0
ip link set br0 up

(umask 077; head -c 128 /dev/urandom > /run/munge/munge.key)
munged --key-file=/run/munge/munge.key --pid-file=/run/munge/pid --seed-file=/run/munge/seed \
    --socket=/run/munge/munge.socket.2 --log-file="$base/logs/munged.log"
slurmctld -D &
touch /run/ready
wait
