//! Mounts and unmounts: by mount(2) as root, by fusermount3 otherwise.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::ServeError;
use crate::config::Config;
use crate::format::layout;
use crate::io::sys::{self, Detach};

fn refuse(mount: &Path, why: impl Into<String>) -> ServeError {
    ServeError::Mount { mount: mount.display().to_string(), why: why.into() }
}

fn is_dead(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// The mount points of this namespace with their filesystem types.
fn mounts() -> io::Result<Vec<(PathBuf, String)>> {
    let mut text = String::new();
    File::open("/proc/self/mountinfo")?.read_to_string(&mut text)?;
    let unescape = |s: &str| {
        s.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
    };
    let parse = |line: &str| {
        let target = line.split(' ').nth(4)?;
        let kind = line.split(" - ").nth(1)?.split(' ').next()?;
        Some((PathBuf::from(unescape(target)), kind.to_owned()))
    };
    Ok(text.lines().filter_map(parse).collect())
}

/// The minor number of the device of a mount, by which the kernel names its connection. The mount itself is not
/// accessed, because it may hang.
pub fn device(path: &Path) -> Option<u32> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let escaped = path.to_str()?.replace('\\', "\\134").replace(' ', "\\040");
    let line = text.lines().rfind(|line| line.split(' ').nth(4) == Some(&escaped))?;
    line.split(' ').nth(2)?.split_once(':')?.1.parse().ok()
}

/// How long the check of the mount point may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

/// Prepares the mount point: creates it when it is missing, removes a dead mount, and refuses a directory that is in
/// use.
///
/// Returns its path without symbolic links.
pub fn prepare(config: &Config) -> Result<PathBuf, ServeError> {
    // An access to a live mount without a server waits for ever. It may be one that a service manager keeps for the
    // next daemon, or one of another program. So another thread accesses the mount point, and this one has a time
    // limit.
    let (done, result) = mpsc::channel();
    let own = config.clone();
    let check = move || drop(done.send(check_and_prepare(&own)));
    let thread = std::thread::Builder::new().name("mount point".into()).spawn(check);
    let thread = thread.map_err(|e| refuse(&config.mount, e.to_string()))?;
    match result.recv_timeout(CHECK_TIMEOUT) {
        Ok(result) => {
            // The caller needs to be the only thread.
            let _ = thread.join();
            result
        }
        Err(_) => Err(refuse(
            &config.mount,
            format!(
                "no process has answered there for {} s: it is a mount whose daemon is gone or hangs. When the service \
                 manager keeps it (systemctl status plyfs), start the service; to give it up: umount -l {}",
                CHECK_TIMEOUT.as_secs(),
                config.mount.display()
            ),
        )),
    }
}

fn check_and_prepare(config: &Config) -> Result<PathBuf, ServeError> {
    let mount = config.mount.as_path();
    let failed = |what: &str, e: io::Error| refuse(mount, format!("{what}: {e}"));
    let parent = mount.parent().unwrap_or(Path::new("/"));
    match fs::symlink_metadata(mount) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o755);
            builder.create(mount).map_err(|e| failed("it does not exist and cannot be created", e))?;
        }
        Err(e) if !is_dead(&e) => return Err(failed("cannot access it", e)),
        _ => {}
    }
    let parent = fs::canonicalize(parent).map_err(|e| failed("cannot access its parent directory", e))?;
    let path = match fs::canonicalize(mount) {
        Ok(path) => path,
        // A dead mount cannot be resolved.
        Err(e) if is_dead(&e) => parent.join(mount.file_name().unwrap_or_default()),
        Err(e) => return Err(failed("cannot access it", e)),
    };
    // A mount can lie on a mount that a crash left, so each layer is checked.
    for _ in 0..16 {
        let top = mounts().map_err(|e| failed("cannot read the table of mounts", e))?;
        let Some((_, kind)) = top.into_iter().rfind(|(target, _)| *target == path) else { break };
        match fs::metadata(&path) {
            Err(e) if is_dead(&e) && kind.starts_with("fuse") => {
                tracing::warn!(mount = %path.display(), "a dead mount of an earlier daemon is cleaned up");
                end(&path, Detach::Yes)
                    .map_err(|e| failed("a dead mount is there and cannot be removed", e))?;
            }
            _ => {
                return Err(refuse(
                    mount,
                    format!(
                        "something ({kind}) is mounted there already; unmount it or choose another directory"
                    ),
                ));
            }
        }
    }
    let meta = fs::metadata(&path).map_err(|e| failed("cannot access it", e))?;
    if !meta.is_dir() {
        return Err(refuse(mount, "it is not a directory; choose another path"));
    }
    let store = fs::canonicalize(&config.store).map_err(|e| failed("cannot access the store", e))?;
    if store.starts_with(&path) {
        return Err(refuse(
            mount,
            "the store lies in it; choose a mount point outside of the store's parents",
        ));
    }
    for part in layout::DIRS {
        if path.starts_with(store.join(part)) {
            return Err(refuse(
                mount,
                format!("it lies in the store's own {part}/; choose another directory"),
            ));
        }
    }
    let entries = fs::read_dir(&path).map_err(|e| failed("cannot read it", e))?;
    if entries.count() > 0 {
        return Err(refuse(
            mount,
            "it is not empty, and the mount would hide its contents; choose an empty directory",
        ));
    }
    Ok(path)
}

/// Mounts, and returns the descriptor of /dev/fuse.
pub fn begin(config: &Config, path: &Path) -> Result<OwnedFd, ServeError> {
    let failed = |e: io::Error| refuse(path, e.to_string());
    let (uid, gid) = sys::effective_ids();
    let allow_other = if config.allow_other { ",allow_other" } else { "" };
    if uid != 0 {
        return with_fusermount(
            path,
            &format!("fsname=plyfs,subtype=plyfs,default_permissions{allow_other}"),
        );
    }
    let fuse = File::options().read(true).write(true).open("/dev/fuse").map_err(|e| {
        refuse(path, format!("cannot open /dev/fuse: {e}; load the module with: modprobe fuse"))
    })?;
    let mode = fs::metadata(path).map_err(failed)?.mode();
    let options = format!(
        "fd={},rootmode={mode:o},user_id={uid},group_id={gid},default_permissions{allow_other}",
        fuse.as_raw_fd()
    );
    sys::mount_fuse(path, &options).map_err(failed)?;
    Ok(fuse.into())
}

fn with_fusermount(path: &Path, options: &str) -> Result<OwnedFd, ServeError> {
    let failed =
        |e: io::Error| refuse(path, format!("cannot run fusermount3: {e}; install the package fuse3"));
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    sys::set_cloexec(theirs.as_raw_fd(), false).map_err(failed)?;
    let child = Command::new("fusermount3")
        .arg("-o")
        .arg(options)
        .arg("--")
        .arg(path)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    drop(theirs);
    let fuse = sys::receive_fd(&ours);
    let output = child.wait_with_output().map_err(failed)?;
    fuse.map_err(|_| {
        let text = String::from_utf8_lossy(&output.stderr);
        let hint = if text.contains("user_allow_other") {
            "; add user_allow_other to /etc/fuse.conf, or serve without --allow-other"
        } else {
            ""
        };
        refuse(path, format!("{}{hint}", text.trim().replace('\n', " ")))
    })
}

/// Unmounts. Without `Detach::Yes` it fails with EBUSY while files are open.
pub fn end(path: &Path, detach: Detach) -> io::Result<()> {
    if sys::effective_ids().0 == 0 {
        return sys::unmount(path, detach);
    }
    let flag = if detach == Detach::Yes { "-uz" } else { "-u" };
    let output = Command::new("fusermount3").arg(flag).arg("--").arg(path).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let busy = text.contains("busy");
    Err(if busy { io::Error::from_raw_os_error(libc::EBUSY) } else { io::Error::other(text) })
}
