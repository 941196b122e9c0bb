# Functions shared by the scripts in this directory, which source it.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The environment may set another target directory of Cargo.
PLYFS=${PLYFS_BIN:-${CARGO_TARGET_DIR:-$ROOT/target}/release/plyfs}
# For mke2fs and debootstrap where only root has sbin in PATH, and for cargo installed by rustup.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:${CARGO_HOME:-$HOME/.cargo}/bin
export PATH

# The packages of all scripts. `scripts/test` installs them in one call, so that apt resolves them together.
# shellcheck disable=SC2034
TEST_PACKAGES=(shellcheck python3-venv g++ fuse3 fio qemu-utils qemu-system-x86 nbdkit libnbd-bin debootstrap e2fsprogs xfsprogs strace jq python3 curl nginx-light qemu-block-extra
    systemd-container prometheus rpm zsh fish man-db binutils dpkg-dev cpio kmod rsync socat libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients
    extlinux syslinux-common chromium fonts-dejavu-core python3-libvirt)

# What scripts/test-sources radosgw needs.
# shellcheck disable=SC2034
CEPH_PACKAGES=(ceph-mon ceph-mgr ceph-osd ceph-common radosgw uuid-runtime)

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# step TITLE COMMAND...: runs a command, and prints the title before and the duration after.
step() {
    local title=$1 start=$SECONDS
    shift
    printf '\n==> %s\n' "$title"
    "$@"
    printf '<== %s: %d s\n' "$title" $((SECONDS - start))
}

installed() {
    [[ $(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null) == ii* ]]
}

# need_packages PACKAGE...: installs missing packages, or prints the command that does and exits.
need_packages() {
    local package missing=() apt=(apt-get install -y --no-install-recommends) sudo=(env)
    command -v dpkg-query >/dev/null || die "this script installs Debian packages; on this system, install: $*"
    for package in "$@"; do
        installed "$package" || missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0

    if [[ $(id -u) -ne 0 ]]; then
        if sudo -n true 2>/dev/null; then
            sudo=(sudo -n env)
        elif [[ -t 0 ]] && command -v sudo >/dev/null; then
            sudo=(sudo env)
        else
            qemu_pin "${missing[@]}"
            die "missing packages; as root: apt-get update && ${apt[*]} ${PINNED[*]}"
        fi
    fi
    printf 'installing: %s\n' "${missing[*]}"
    local log
    log=$(mktemp)
    "${sudo[@]}" apt-get update -qq >"$log" 2>&1 || { cat "$log" >&2; die "apt-get update failed"; }
    qemu_pin "${missing[@]}"
    if ! "${sudo[@]}" DEBIAN_FRONTEND=noninteractive "${apt[@]}" "${PINNED[@]}" </dev/null >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        die "could not install; as root: apt-get update && ${apt[*]} ${PINNED[*]}"
    fi
    rm -f "$log"
}

# Sets PINNED to the arguments, and adds qemu-utils in the version of qemu-system-x86 if another version is installed.
#
# A newer qemu-utils (e.g. from backports) Breaks the older qemu-system-common on which qemu-system-x86 depends, and apt
# does not downgrade by itself: it calls qemu-system-common "not installable". An explicit version permits it.
qemu_pin() {
    PINNED=("$@")
    [[ " $* " == *" qemu-system-x86 "* ]] && installed qemu-utils || return 0
    local have want
    have=$(dpkg-query -W -f '${Version}' qemu-utils)
    want=$(apt-cache policy qemu-system-x86 | awk '$1 == "Candidate:" {print $2}')
    if [[ $have != "$want" ]] && apt-cache madison qemu-utils | awk '{print $3}' | grep -qxF "$want"; then
        PINNED+=(--allow-downgrades "qemu-utils=$want")
    fi
}

# need_cargo_tool CRATE BINARY: installs a tool from crates.io if it is missing.
need_cargo_tool() {
    command -v "$2" >/dev/null && return 0
    command -v cargo >/dev/null || die "cargo is missing: install a Rust toolchain (https://rustup.rs)"
    printf 'installing: %s (cargo)\n' "$1"
    cargo install --locked --quiet "$1" || die "could not install $2; run: cargo install --locked $1"
}

# need_rust [--target TARGET] [TOOLCHAIN]: has rustup install a toolchain, or a target's standard library. Fails when it
# cannot, as where Rust does not come from rustup or its server is out of reach.
need_rust() {
    command -v rustup >/dev/null || return 1
    if [[ $1 == --target ]]; then
        rustup target list --installed | grep -qxF "$2" || timeout 300 rustup target add "$2" >/dev/null 2>&1
    else
        rustup toolchain list | grep -q "^$1-" || timeout 300 rustup toolchain install --profile minimal "$1" >/dev/null 2>&1
    fi
}

# need_python VARIABLE PACKAGE VERSION: installs the program of a PyPI package into a virtual environment below the
# target directory if it is missing. Sets VARIABLE to its path.
need_python() {
    local place=${CARGO_TARGET_DIR:-$ROOT/target}/python
    local -n found=$1
    found=$place/bin/$2
    [[ -x $found ]] && return 0
    found=$(command -v "$2") && return 0
    need_packages python3-venv
    printf 'installing: %s (pip)\n' "$2"
    /usr/bin/python3 -m venv "$place" || die "could not create a virtual environment in $place"
    "$place/bin/pip" install --quiet --disable-pip-version-check "$2==$3" || die "could not install $2; run: pip install $2"
    found=$place/bin/$2
}

# Installs the Python linter. Sets RUFF.
need_ruff() {
    need_python RUFF ruff 0.17.6
}

# Installs the client that tests an API against its description. Sets SCHEMATHESIS.
need_schemathesis() {
    need_python SCHEMATHESIS schemathesis 4.32.5
}

# A Python with boto3 and moto, for scripts/test-sources. Sets S3_PYTHON.
need_s3_python() {
    local place=${CARGO_TARGET_DIR:-$ROOT/target}/python-s3
    S3_PYTHON=$place/bin/python
    "$S3_PYTHON" -c 'import boto3, moto' 2>/dev/null && return 0
    need_packages python3-venv
    printf 'installing: boto3, moto (pip)\n'
    rm -rf "$place"
    /usr/bin/python3 -m venv "$place" || die "could not create a virtual environment in $place"
    "$place/bin/pip" install --quiet --disable-pip-version-check boto3==1.44.5 'moto[s3,server]==5.2.5' ||
        die "could not install moto; run: pip install boto3 'moto[s3,server]'"
}

# scripts_by INTERPRETER: the scripts whose first line names this interpreter.
scripts_by() {
    grep -slE "^#!.*\\b$1\\b" "$ROOT"/scripts/* "$ROOT"/.ci/*
}

# need_kernel: exits with a message when the kernel is too old, before anything is installed or built. The daemon names the
# package of each distribution.
need_kernel() {
    local major minor
    IFS=.- read -r major minor _ </proc/sys/kernel/osrelease
    ((major > 5 || (major == 5 && ${minor//[^0-9]/} >= 14))) || die "the kernel is Linux $(uname -r), and plyfs needs Linux 5.14 or newer;" \
        "install a newer kernel package (Debian: linux-image-amd64 of Debian 12 or of bullseye-backports), and reboot the host"
}

# need_fuse: exits with a message unless FUSE can be used.
need_fuse() {
    need_kernel
    [[ -c /dev/fuse ]] || die "/dev/fuse is missing: load the kernel module (modprobe fuse), or pass the device to this container"
    [[ -r /dev/fuse && -w /dev/fuse ]] || die "/dev/fuse cannot be opened by $(id -un): chmod 666 /dev/fuse, or run as root"
    [[ $(id -u) -eq 0 ]] || command -v fusermount3 >/dev/null || die "fusermount3 is missing: apt-get install fuse3"
}

# need_room DIR MIB: exits with a message if the directory's filesystem has less free space.
need_room() {
    local free
    free=$(df --output=avail -BM "$1" | tail -n 1 | tr -dc 0-9)
    [[ $free -ge $2 ]] || die "$1 has $free MiB free, $2 MiB are needed; set TMPDIR or PLYFS_GUEST_CACHE to another directory"
}

# serve LOG ARGS...: starts `plyfs serve ARGS...` with its output in LOG, and returns when it is ready. Sets SERVE_PID
# and MOUNT.
serve() {
    local log=$1 line tries=0
    shift
    : >"$log"
    "$PLYFS" serve "$@" >"$log" 2>&1 &
    SERVE_PID=$!
    until line=$(grep -m 1 '^plyfs ready ' "$log"); do
        if ! kill -0 "$SERVE_PID" 2>/dev/null || ((++tries > 600)); then
            cat "$log" >&2
            die "plyfs serve did not become ready"
        fi
        sleep 0.05
    done
    MOUNT=${line#plyfs ready mount=}
    MOUNT=${MOUNT% socket=*}
}

# step_with PROMISE TITLE COMMAND...: as step, where the kernel allows the promise; else a line SKIP.
step_with() {
    local promise=$1 store
    shift
    if [[ -z ${KERNEL_LACKS+set} ]]; then
        store=$(mktemp -d "${TMPDIR:-/var/tmp}/plyfs-kernel.XXXXXX")
        KERNEL_LACKS=$(serve "$store/log" --store "$store/store" &&
            "$PLYFS" --store "$store/store" --json status | jq -r '.kernel.missing[].promise' &&
            "$PLYFS" --store "$store/store" stop && wait "$SERVE_PID")
        rm -rf --one-file-system "$store"
    fi
    if grep -qx "$promise" <<<"$KERNEL_LACKS"; then
        printf '\nSKIP: %s: the kernel lacks %s (README, "Kernels")\n' "$1" "$promise"
    else
        step "$@"
    fi
}

# For traps: ends the daemon that serve() started, if it still runs, and removes its mount.
end_serve() {
    if [[ -n ${SERVE_PID:-} ]] && kill -0 "$SERVE_PID" 2>/dev/null; then
        kill -TERM "$SERVE_PID" 2>/dev/null || true
        local tries=0
        while kill -0 "$SERVE_PID" 2>/dev/null && ((++tries < 200)); do sleep 0.05; done
        kill -KILL "$SERVE_PID" 2>/dev/null || true
        wait "$SERVE_PID" 2>/dev/null || true
    fi
    SERVE_PID=
    if [[ -n ${MOUNT:-} ]] && grep -qF " $MOUNT fuse" /proc/self/mounts; then
        fusermount3 -u "$MOUNT" 2>/dev/null || fusermount3 -uz "$MOUNT" 2>/dev/null || umount -l "$MOUNT" || true
    fi
}

# newer_qemu: prints the directory below which the QEMU of Debian's backports is unpacked, in the target directory. Nothing is
# installed. Prints nothing and fails where there are no backports.
newer_qemu() {
    local place=${CARGO_TARGET_DIR:-$ROOT/target}/qemu-backports suite package
    local key=/usr/share/keyrings/debian-archive-keyring.gpg
    if [[ ! -x $place/root/usr/bin/qemu-storage-daemon ]]; then
        # shellcheck source=/dev/null
        suite=$(source /etc/os-release && [[ ${ID:-} == debian ]] && echo "$VERSION_CODENAME-backports") || return 1
        rm -rf "$place"
        mkdir -p "$place"/{state/lists/partial,cache/archives/partial,packages}
        echo "deb [signed-by=$key] http://deb.debian.org/debian $suite main" >"$place/sources.list"
        local options=(-o "Dir::Etc::sourcelist=$place/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State=$place/state"
            -o Dir::State::status=/var/lib/dpkg/status -o "Dir::Cache=$place/cache" -o APT::Sandbox::User=root)
        apt-get "${options[@]}" -qq update >&2 || return 1
        (cd "$place/packages" && apt-get "${options[@]}" -qq download qemu-utils qemu-system-common >&2) || return 1
        for package in "$place"/packages/*.deb; do dpkg -x "$package" "$place/root" || return 1; done
        rm -rf "$place"/{state,cache,packages}
    fi
    "$place/root/usr/bin/qemu-storage-daemon" --version >/dev/null || return 1
    echo "$place/root"
}
