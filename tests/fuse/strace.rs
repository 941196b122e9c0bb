//! strace(1), attached to a process.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::harness::{signal, tool};

/// Traces a process and all its threads until dropped.
pub struct Strace(Child);

impl Strace {
    /// Returns once strace is attached. `None`, with a line SKIP, when strace is missing.
    pub fn attach(pid: i32, arguments: &[&str]) -> Option<Self> {
        let mut child = Command::new(tool("strace")?)
            .args(["-f", "-p", &pid.to_string()])
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // strace prints one line when it is attached to the process and all its threads.
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let line = lines.next().expect("strace says something").unwrap();
        assert!(line.contains("attached"), "{line}");
        std::thread::spawn(move || lines.for_each(drop));
        Some(Self(child))
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // strace detaches at SIGINT.
        signal(self.0.id() as i32, libc::SIGINT);
        let _ = self.0.wait();
    }
}
