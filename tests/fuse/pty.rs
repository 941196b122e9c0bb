//! A command on a terminal of its own.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::harness::until;

/// The command has the terminal as its standard input, output and error.
pub struct Pty {
    child: Child,
    terminal: File,
    output: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

/// A new terminal: the side of this process, and the side of the command. Other children do not inherit them, or they
/// would keep the terminal open after the command's end.
fn terminal() -> io::Result<(File, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let opened = |fd: libc::c_int| match fd {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the call before opened it for this process, and nothing else has it.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    };
    // SAFETY: takes flags only.
    let ours = opened(unsafe { libc::posix_openpt(flags) })?;
    // SAFETY: the descriptor is a terminal, and no memory is passed.
    if unsafe { libc::grantpt(ours.as_raw_fd()) != 0 || libc::unlockpt(ours.as_raw_fd()) != 0 } {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes flags only.
    let theirs = opened(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    Ok((File::from(ours), theirs))
}

fn set_size(terminal: &File, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is a terminal, and the size is read.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Pty {
    pub fn spawn(mut command: Command, columns: u16, rows: u16) -> Self {
        let (terminal, theirs) = terminal().unwrap();
        set_size(&terminal, columns, rows).unwrap();
        let end = || Stdio::from(theirs.try_clone().unwrap());
        command.env("TERM", "xterm-256color").env("LC_ALL", "C.UTF-8").env_remove("NO_COLOR");
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: both calls may be made between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        drop((command, theirs));
        let output = Arc::new(Mutex::new(Vec::new()));
        let (mut from, into) = (terminal.try_clone().unwrap(), output.clone());
        let reader = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The last process that closes the terminal ends the reads with EIO.
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                into.lock().unwrap().extend_from_slice(&bytes[..count]);
            }
        });
        Self { child, terminal, output, reader: Some(reader) }
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Types keys.
    pub fn type_keys(&mut self, keys: &str) {
        self.terminal.write_all(keys.as_bytes()).unwrap();
    }

    /// Gives the terminal another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        set_size(&self.terminal, columns, rows).unwrap();
    }

    /// All output so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).into_owned()
    }

    /// Waits until the output has a text.
    #[track_caller]
    pub fn until_shown(&self, text: &str) {
        until(&format!("{text:?} on the terminal"), || self.output().contains(text).then_some(()));
    }

    /// Waits for the end of the command. Returns its status and all of its output.
    #[track_caller]
    pub fn end(mut self) -> (Option<i32>, String) {
        let status = until("the end of the command", || self.child.try_wait().unwrap());
        self.reader.take().unwrap().join().unwrap();
        (status.code(), self.output())
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
