//! `plyfs systemd-generator`: what the order of the service depends on and only the configuration knows. systemd runs
//! it at boot and at each daemon-reload. Source: systemd.generator(7).
//!
//! What must hold: the service starts after the filesystem that the store is on, and at a shutdown systemd does not
//! unmount plyfs before the service has stopped. A configuration that is wrong breaks nothing here: the service says so.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::Global;
use super::error::CliError;
use crate::config::{Config, Overrides, place};

/// Write what the order of the service depends on
#[derive(Debug, clap::Args)]
pub(super) struct Generator {
    /// Where the files go: systemd gives three directories, and the first is the one
    #[arg(required = true)]
    dirs: Vec<PathBuf>,
}

impl Generator {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let file = place::file(global.config.as_deref(), None)?;
        let config = Config::load(file.as_deref(), Overrides::default())?;
        let Some(dir) = self.dirs.first() else { return Ok(()) };
        let dir = dir.join("plyfs.service.d");
        let path = dir.join("50-places.conf");
        std::fs::create_dir_all(&dir)
            .and_then(|()| std::fs::write(&path, drop_in(&config.store, &config.mount)))
            .map_err(|source| CliError::Transfer { action: "cannot write a unit".into(), path, source })
    }
}

fn drop_in(store: &Path, mount: &Path) -> String {
    let mut out = "# Made by plyfs-generator from the configuration of plyfs.\n[Unit]\n".to_owned();
    // Not the mount point itself: the service makes that mount, and would require it.
    for dir in [Some(store), mount.parent()].into_iter().flatten() {
        let _ = writeln!(out, "RequiresMountsFor={}", quoted(dir));
    }
    let _ = writeln!(out, "After={}.mount", escaped(mount));
    out
}

fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy().replace('%', "%%").replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{text}\"")
}

/// The name of the unit of a path. Source: systemd.unit(5), "String escaping for inclusion in unit names".
fn escaped(path: &Path) -> String {
    let text = path.to_string_lossy();
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() {
        return "-".to_owned();
    }
    let mut out = String::new();
    for (index, byte) in parts.join("/").bytes().enumerate() {
        match byte {
            b'/' => out.push('-'),
            b'.' if index == 0 => out.push_str("\\x2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => out.push(char::from(byte)),
            _ => {
                let _ = write!(out, "\\x{byte:02x}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_units_are_those_of_systemd_escape() {
        for (path, name) in [
            ("/var/lib/plyfs/mnt", "var-lib-plyfs-mnt"),
            ("/mnt/vm-1/", "mnt-vm\\x2d1"),
            ("/.hidden/a b", "\\x2ehidden-a\\x20b"),
            ("/", "-"),
            ("/srv//é", "srv-\\xc3\\xa9"),
        ] {
            assert_eq!(escaped(Path::new(path)), name, "{path}");
        }
    }

    #[test]
    fn the_service_waits_for_the_filesystems_of_store_and_mount_point() {
        let text = drop_in(Path::new("/srv/100% vm"), Path::new("/mnt/vm"));
        for line in
            ["RequiresMountsFor=\"/srv/100%% vm\"", "RequiresMountsFor=\"/mnt\"", "After=mnt-vm.mount"]
        {
            assert!(text.lines().any(|had| had == line), "{text}");
        }
    }
}
