//! Refuses kernels before Linux 5.14, and reports what a later one lacks, which the mount finds out (`fuse::promises`).

use std::fs;

use super::ServeError;
use crate::control::wire::{Kernel, MissingPromise};
use crate::fuse::promises::Protocol;

/// The oldest Linux that is served.
const OLDEST: (u32, u32) = (5, 14);
/// The release of the running kernel, as proc(5) has it.
const RELEASE: &str = "/proc/sys/kernel/osrelease";

/// Refuses a kernel that is too old, before anything of the store is looked at or made.
///
/// # Errors
/// With the package that brings a newer one.
pub fn check() -> Result<(), ServeError> {
    let release = fs::read_to_string(RELEASE).unwrap_or_default();
    let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
    match refusal(release.trim(), &os) {
        Some(why) => Err(ServeError::Kernel { why }),
        None => Ok(()),
    }
}

/// Reports at the start what this kernel lacks.
pub fn warn(protocol: Protocol) {
    let missing = protocol.missing();
    if missing.is_empty() {
        return;
    }
    let lacks: Vec<String> = missing
        .into_iter()
        .map(|promise| format!("{} (Linux {})", promise.instead(), promise.since()))
        .collect();
    tracing::warn!("Linux {} lacks what plyfs can use: {}; see plyfs status", release(), lacks.join("; "));
}

/// The kernel as `status` shows it.
pub fn describe(protocol: Protocol, release: String) -> Kernel {
    let missing = protocol.missing().into_iter().map(|promise| MissingPromise {
        promise: promise.name().to_owned(),
        since: promise.since().to_owned(),
        instead: promise.instead().to_owned(),
    });
    Kernel { release, fuse: format!("7.{}", protocol.minor), missing: missing.collect() }
}

/// The running kernel's release.
pub fn release() -> String {
    fs::read_to_string(RELEASE).unwrap_or_default().trim().to_owned()
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Why this kernel is not served; `None` also when its release says nothing.
fn refusal(release: &str, os: &str) -> Option<String> {
    let found = version(release)?;
    let (major, minor) = OLDEST;
    (found < OLDEST).then(|| {
        format!(
            "the kernel is Linux {release}, and plyfs needs Linux {major}.{minor} or newer; {}",
            remedy(os)
        )
    })
}

/// The package of a distribution that brings a newer kernel.
fn remedy(os: &str) -> &'static str {
    let value = |key: &str| {
        let line = os.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches(['"', '\''])
    };
    let major = value("VERSION_ID").split('.').next().unwrap_or_default();
    match (value("ID"), major) {
        ("debian", "11") => {
            "install linux-image-amd64 of Debian 12, or of bullseye-backports (Linux 6.1), and reboot the host"
        }
        ("debian", _) => "install linux-image-amd64 of Debian 12 or newer (Linux 6.1), and reboot the host",
        ("ubuntu", "20") => "install linux-generic-hwe-20.04 (Linux 5.15), and reboot the host",
        ("ubuntu", _) => "install linux-generic of Ubuntu 22.04 or newer (Linux 5.15), and reboot the host",
        ("rhel" | "centos" | "rocky" | "almalinux" | "ol", _) => {
            "install kernel of release 9 or newer (Linux 5.14), or kernel-ml of ELRepo, and reboot the host"
        }
        ("sles" | "opensuse-leap", _) => {
            "install kernel-default of 15 SP4 or newer (Linux 5.14), and reboot the host"
        }
        _ => "install a newer kernel package of the distribution, and reboot the host",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_too_old_is_refused_with_the_package_that_brings_a_newer_one() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 11 (bullseye)\"\nVERSION_ID=\"11\"\nID=debian\n";
        let why = refusal("5.10.0-35-amd64", debian).expect("it is too old");
        assert!(why.contains("5.10.0-35-amd64") && why.contains("linux-image-amd64"), "{why}");
        let why = refusal("5.4.0-200-generic", "ID=ubuntu\nVERSION_ID=\"20.04\"\n").expect("it is too old");
        assert!(why.contains("linux-generic-hwe-20.04"), "{why}");
        let why = refusal("4.18.0-553.el8_10.x86_64", "ID=\"rocky\"\nVERSION_ID=\"8.10\"\n");
        assert!(why.expect("it is too old").contains("ELRepo"));
        assert!(refusal("5.13.19", "").expect("it is too old").contains("newer kernel package"));
    }

    #[test]
    fn stock_kernels_of_hosts_are_served() {
        for release in
            ["5.14.0-427.el9.x86_64", "5.15.0-119-generic", "6.1.0-37-amd64", "6.8.0-45", "6.18+", "7.0"]
        {
            assert_eq!(refusal(release, ""), None, "{release}");
        }
        assert_eq!(refusal("", ""), None, "a kernel that hides its release is judged by its FUSE");
    }
}
