//! Making and ending the mount: mount(2) as root, fusermount3 otherwise.

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

/// Mount points of this namespace with the type of their filesystem.
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

/// The minor number of the device of a mount, by which the kernel names its connection. The mount itself is not asked.
pub fn device(path: &Path) -> Option<u32> {
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let escaped = path.to_str()?.replace('\\', "\\134").replace(' ', "\\040");
    let line = text.lines().rfind(|line| line.split(' ').nth(4) == Some(&escaped))?;
    line.split(' ').nth(2)?.split_once(':')?.1.parse().ok()
}

/// How long the kernel may take to say what is on the mount point.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the mount point fit: made when missing, cleaned of a dead mount, refused when it is in use.
///
/// Returns its path without symbolic links.
pub fn prepare(config: &Config) -> Result<PathBuf, ServeError> {
    // Whoever looks at a mount that lives and that nobody serves waits for ever: one that a service manager keeps for
    // a daemon that is to come, or somebody else's. This thread does not look.
    let (done, result) = mpsc::channel();
    let own = config.clone();
    let look = move || drop(done.send(prepare_here(&own)));
    let thread = std::thread::Builder::new().name("mount point".into()).spawn(look);
    let thread = thread.map_err(|e| refuse(&config.mount, e.to_string()))?;
    match result.recv_timeout(PATIENCE) {
        Ok(result) => {
            // What comes next wants to be the only thread.
            let _ = thread.join();
            result
        }
        Err(_) => Err(refuse(
            &config.mount,
            format!(
                "nobody answers there for {} s: a mount is there whose daemon is gone or hangs. When the service \
                 manager keeps it (systemctl status plyfs), start the service; to give it up: umount -l {}",
                PATIENCE.as_secs(),
                config.mount.display()
            ),
        )),
    }
}

fn prepare_here(config: &Config) -> Result<PathBuf, ServeError> {
    let mount = config.mount.as_path();
    let said = |what: &str, e: io::Error| refuse(mount, format!("{what}: {e}"));
    let parent = mount.parent().unwrap_or(Path::new("/"));
    match fs::symlink_metadata(mount) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o755);
            builder.create(mount).map_err(|e| said("it does not exist and cannot be made", e))?;
        }
        Err(e) if !is_dead(&e) => return Err(said("it cannot be looked at", e)),
        _ => {}
    }
    let parent = fs::canonicalize(parent).map_err(|e| said("its directory cannot be looked at", e))?;
    let path = match fs::canonicalize(mount) {
        Ok(path) => path,
        // A dead mount cannot be looked through.
        Err(e) if is_dead(&e) => parent.join(mount.file_name().unwrap_or_default()),
        Err(e) => return Err(said("it cannot be looked at", e)),
    };
    // A mount can lie on a mount that a crash left; each layer is looked at.
    for _ in 0..16 {
        let top = mounts().map_err(|e| said("reading the table of mounts", e))?;
        let Some((_, kind)) = top.into_iter().rfind(|(target, _)| *target == path) else { break };
        match fs::metadata(&path) {
            Err(e) if is_dead(&e) && kind.starts_with("fuse") => {
                tracing::warn!(mount = %path.display(), "a dead mount of an earlier daemon is cleaned up");
                end(&path, Detach::Yes)
                    .map_err(|e| said("a dead mount is there and cannot be removed", e))?;
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
    let meta = fs::metadata(&path).map_err(|e| said("it cannot be looked at", e))?;
    if !meta.is_dir() {
        return Err(refuse(mount, "it is not a directory; choose another path"));
    }
    let store = fs::canonicalize(&config.store).map_err(|e| said("the store cannot be looked at", e))?;
    if store.starts_with(&path) {
        return Err(refuse(mount, "the store lies in it; choose a mount point outside"));
    }
    for part in layout::DIRS {
        if path.starts_with(store.join(part)) {
            return Err(refuse(
                mount,
                format!("it lies in the store's own {part}/; choose another directory"),
            ));
        }
    }
    let entries = fs::read_dir(&path).map_err(|e| said("it cannot be read", e))?;
    if entries.count() > 0 {
        return Err(refuse(
            mount,
            "it is not empty; choose an empty directory, its contents would be hidden",
        ));
    }
    Ok(path)
}

/// Mounts, and returns the descriptor that requests come from.
pub fn begin(config: &Config, path: &Path) -> Result<OwnedFd, ServeError> {
    let said = |e: io::Error| refuse(path, e.to_string());
    let (uid, gid) = sys::effective_ids();
    let allow_other = if config.allow_other { ",allow_other" } else { "" };
    if uid != 0 {
        return with_fusermount(
            path,
            &format!("fsname=plyfs,subtype=plyfs,default_permissions{allow_other}"),
        );
    }
    let fuse =
        File::options().read(true).write(true).open("/dev/fuse").map_err(|e| {
            refuse(path, format!("opening /dev/fuse: {e}; load the module with: modprobe fuse"))
        })?;
    let mode = fs::metadata(path).map_err(said)?.mode();
    let options = format!(
        "fd={},rootmode={mode:o},user_id={uid},group_id={gid},default_permissions{allow_other}",
        fuse.as_raw_fd()
    );
    sys::mount_fuse(path, &options).map_err(said)?;
    Ok(fuse.into())
}

fn with_fusermount(path: &Path, options: &str) -> Result<OwnedFd, ServeError> {
    let said = |e: io::Error| refuse(path, format!("fusermount3: {e}; install the package fuse3"));
    let (ours, theirs) = UnixStream::pair().map_err(said)?;
    sys::set_cloexec(theirs.as_raw_fd(), false).map_err(said)?;
    let child = Command::new("fusermount3")
        .arg("-o")
        .arg(options)
        .arg("--")
        .arg(path)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(said)?;
    drop(theirs);
    let fuse = sys::receive_fd(&ours);
    let output = child.wait_with_output().map_err(said)?;
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

/// Ends the mount; EBUSY when files are open and it is not to be detached.
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
