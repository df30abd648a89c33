# First process of a virtual host: gives it its own folders and address, then runs its slurmd.
# Usage: bash -eu host.sh NAME ADDRESS STAGE [SHARED…], inside login's namespaces; waits for eth0 to be moved in.
# STAGE is an empty directory; each SHARED lies below /tmp and stays visible there.
name=$1 address=$2 stage=$3
shift 3
hostname "$name"
mount -t tmpfs -o mode=755 slurmd /run/slurmd
mount -t tmpfs -o mode=1777 shm /dev/shm

# The new /tmp gets the shared directories before it hides the old one.
mount -t tmpfs -o mode=1777 tmp "$stage"
for shared; do
    mkdir -p "$stage/${shared#/tmp/}"
    mount --bind "$shared" "$stage/${shared#/tmp/}"
done
mount --move "$stage" /tmp

ip link set lo up
until ip address add "$address/24" dev eth0 2> /dev/null; do sleep 0.02; done
ip link set eth0 up
slurmd -D -N "$name" &
wait
