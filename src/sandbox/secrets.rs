//! The credential helper: a process that reads credentials for the worker, which itself cannot read files of the host
//! or run programs.
//!
//! What must hold:
//! - The helper reads the files and runs the commands that the configuration names, by number, and the secrets of disks
//!   ([`KeyRequest`]). No message of the worker makes it read or run anything else.
//! - It runs only where the configuration has credentials. Without commands it is confined as the opener is, to the
//!   directories of the files. Commands are the operator's own programs and have the rights of the daemon.
//! - It passes secrets to the worker only. It keeps only one socket and standard error of the worker, and dies with it.

mod clouds;
mod keys;
#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::confine;
use clouds::Tokens;
pub use keys::KeyRequest;

use crate::config::{Config, CredentialConfig, CredentialSource, HttpConfig, S3Config, S3Keys};
use crate::io::{confine as process, sys};
use crate::source::http::{Credentials, Secret, SecretName, Section};

/// Most bytes of a secret. A message has one more byte.
const LONGEST: usize = process::MAX_MESSAGE - 1;
const COMMAND_TIME: Duration = Duration::from_secs(10);
pub(super) const COMMAND_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How often the helper checks whether a program that has closed its output has ended.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

const GRANTED: u8 = 1;
const REFUSED: u8 = 0;

/// The worker's end.
pub struct CredentialHelper {
    socket: OwnedFd,
}

impl CredentialHelper {
    /// Forks the helper, when the configuration has credentials. The calling process has a single thread.
    ///
    /// # Errors
    /// When the process has other threads, or cannot fork.
    pub fn start(config: &Config) -> io::Result<Option<Self>> {
        if !config.http.reads_secrets() && !config.encryption.reads_secrets() {
            return Ok(None);
        }
        let (ours, theirs) = sys::message_pair()?;
        match process::fork()? {
            process::Forked::Parent(pid) => {
                tracing::debug!(pid, "the credential helper runs");
                Ok(Some(Self { socket: ours }))
            }
            process::Forked::Child => {
                let code = match run(config, &theirs) {
                    Ok(()) => 0,
                    Err(error) => {
                        tracing::error!(%error, "the credential helper ends");
                        1
                    }
                };
                std::process::exit(code);
            }
        }
    }

    /// The secret of a disk. May take some seconds.
    ///
    /// # Errors
    /// The cause, without secrets.
    pub fn key(&self, request: KeyRequest<'_>) -> Result<Secret, String> {
        self.ask(&request.encode())
    }

    fn ask(&self, request: &[u8]) -> Result<Secret, String> {
        match self.exchange(request) {
            Ok(answer) => answer,
            Err(error) if super::opener::is_gone(&error) => {
                tracing::error!(
                    "the credential helper is gone; this worker ends, and the next one starts a new helper"
                );
                std::process::abort();
            }
            Err(error) => Err(format!("cannot ask the credential helper: {error}")),
        }
    }

    fn exchange(&self, request: &[u8]) -> io::Result<Result<Secret, String>> {
        let (ours, theirs) = sys::message_pair()?;
        process::send_message(self.socket.as_fd(), request, Some(theirs.as_fd()))?;
        drop(theirs);
        let mut answer = vec![0; process::MAX_MESSAGE];
        let (got, _) = process::receive_message(ours.as_fd(), &mut answer)?;
        answer.truncate(got);
        match answer.split_first() {
            Some((&GRANTED, secret)) => {
                let secret = Secret::new(secret.to_vec());
                zeroize::Zeroize::zeroize(&mut answer);
                Ok(Ok(secret))
            }
            Some((_, why)) => Ok(Err(String::from_utf8_lossy(why).into_owned())),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Credentials for CredentialHelper {
    fn get(&self, name: SecretName) -> Result<Secret, String> {
        self.ask(&encode(name))
    }
}

/// The message that asks for a secret of the configuration. The largest section begins a request for the secret of a
/// disk.
fn encode(SecretName { section, number }: SecretName) -> [u8; 4] {
    let section = match section {
        Section::Http => 0,
        Section::S3 => 1,
        Section::Cloud => 2,
    };
    let [low, high] = u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes();
    [low, high, section, 0]
}

fn decode(message: &[u8]) -> Option<SecretName> {
    let [low, high, section, 0] = *message else { return None };
    let section = match section {
        0 => Section::Http,
        1 => Section::S3,
        2 => Section::Cloud,
        _ => return None,
    };
    Some(SecretName { section, number: u16::from_le_bytes([low, high]).into() })
}

/// The child. Returns when the worker is gone.
fn run(config: &Config, socket: &OwnedFd) -> io::Result<()> {
    process::set_name(c"plyfs-secrets");
    process::close_all_but(socket.as_fd())?;
    // That of the worker ends the process, after a message on a descriptor that is closed here. The text of a panic may
    // have a part of a secret.
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or_else(String::new, ToString::to_string);
        tracing::error!(place, "the credential helper panicked");
    }));
    std::env::set_current_dir("/")?;
    let network = clouds::network(config);
    match files(&config.http).filter(|_| config.encryption.key_command.is_none()) {
        Some(files) => {
            // The directories, because a new file replaces a secret when it is renewed.
            let parent = |path: &&Path| path.parent().map(Path::to_owned);
            let mut dirs: Vec<PathBuf> = files.iter().filter_map(parent).collect();
            dirs.extend(config.encryption.key_dirs.iter().cloned());
            dirs.extend(clouds::dirs(config));
            match network {
                None => confine::opener(&config.security, &dirs),
                Some(_) => confine::token_helper(&config.security, &dirs),
            }
        }
        None => {
            let _ = process::no_new_privileges();
            let _ = process::forbid_core_dumps();
        }
    }
    // It has a thread, which inherits the limits.
    let tokens = network.and_then(|network| {
        let tokens = Tokens::new(config, &network);
        tokens.map_err(|why| tracing::error!(why, "the helper cannot ask for tokens of clouds")).ok()
    });
    let tokens = tokens.map(Arc::new);
    let mut request = vec![0; process::MAX_MESSAGE];
    loop {
        match process::receive_message(socket.as_fd(), &mut request) {
            Ok((0, _)) => return Ok(()),
            Ok((got, Some(reply))) if got >= 4 => {
                let (request, config, tokens) = (request[..got].to_vec(), config.clone(), tokens.clone());
                let thread = std::thread::Builder::new().name("secret".into());
                carry_out(thread, reply, move || find(&request, &config, tokens.as_deref()));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Err(error) => return Err(error),
        }
    }
}

/// The files of credentials and keys; `None` when one of them is printed by a program.
fn files(http: &HttpConfig) -> Option<Vec<&Path>> {
    let file = |credential| match CredentialConfig::source(credential) {
        Some(
            CredentialSource::Bearer(path) | CredentialSource::Basic(path) | CredentialSource::Headers(path),
        ) => Some(path),
        Some(CredentialSource::Command(_)) | None => None,
    };
    let keys = http.s3.iter().filter_map(|entry| match entry.keys() {
        Some(S3Keys::File(path)) => Some(Some(path)),
        Some(S3Keys::Command(_)) | None => Some(None),
        Some(S3Keys::Environment | S3Keys::Instance(_) | S3Keys::Anonymous) => None,
    });
    http.credentials.iter().map(file).chain(keys).collect()
}

/// Carries out a request on a thread of its own, because a program may take long. There is always an answer: a worker that
/// gets none takes the helper for gone, and ends.
fn carry_out(
    thread: std::thread::Builder,
    reply: OwnedFd,
    work: impl FnOnce() -> Result<Secret, String> + Send + 'static,
) {
    let reply = Arc::new(reply);
    let theirs = reply.clone();
    let run = move || {
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let bug = |_| Err("a bug of plyfs ended the request; report it with the log".to_owned());
        answer(&found.unwrap_or_else(bug), &theirs);
    };
    if let Err(error) = thread.spawn(run) {
        answer(&Err(format!("the credential helper has no thread for it: {error}")), &reply);
    }
}

/// The answer to a request.
fn find(request: &[u8], config: &Config, tokens: Option<&Tokens>) -> Result<Secret, String> {
    if let Some(key) = KeyRequest::decode(request) {
        return key.obtain(&config.encryption);
    }
    let none = || Err("the configuration has no credential of this number".into());
    match decode(request) {
        Some(SecretName { section: Section::Http, number }) => {
            config.http.credentials.get(number).map_or_else(none, obtain)
        }
        Some(SecretName { section: Section::S3, number }) => {
            config.http.s3.get(number).map_or_else(none, keys_of)
        }
        Some(SecretName { section: Section::Cloud, number }) => {
            let tokens = tokens.ok_or("the helper has no client for keystone; see the log")?;
            config.http.clouds.get(number).map_or_else(none, |cloud| tokens.get(cloud))
        }
        None => none(),
    }
}

fn answer(found: &Result<Secret, String>, reply: &OwnedFd) {
    let mut message = zeroize::Zeroizing::new(Vec::with_capacity(process::MAX_MESSAGE));
    match found {
        Ok(secret) => {
            message.push(GRANTED);
            message.extend_from_slice(secret.bytes());
        }
        Err(why) => {
            message.push(REFUSED);
            message.extend(why.bytes().take(LONGEST));
        }
    }
    // This fails when the client is gone. Then no answer is needed.
    let _ = process::send_message(reply.as_fd(), &message, None);
}

fn obtain(credential: &CredentialConfig) -> Result<Secret, String> {
    match credential.source() {
        Some(
            CredentialSource::Bearer(path) | CredentialSource::Basic(path) | CredentialSource::Headers(path),
        ) => read_named(path),
        Some(CredentialSource::Command(command)) => run_command(command, ("PLYFS_URL", &credential.url)),
        None => Err("the credential has no source; name a file or a command".into()),
    }
}

/// Variables with keys, as the AWS CLI names them, and their names in a file of keys.
const KEY_VARIABLES: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "aws_access_key_id"),
    ("AWS_SECRET_ACCESS_KEY", "aws_secret_access_key"),
    ("AWS_SESSION_TOKEN", "aws_session_token"),
];

/// Keys for buckets: a file's text, what a program prints, or variables in the form of a file.
fn keys_of(entry: &S3Config) -> Result<Secret, String> {
    match entry.keys() {
        Some(S3Keys::File(path)) => read_named(path),
        Some(S3Keys::Command(command)) => run_command(command, ("PLYFS_BUCKET", &entry.bucket)),
        Some(S3Keys::Environment) => {
            let section = entry.profile.as_deref().unwrap_or("default");
            let mut text = zeroize::Zeroizing::new(format!("[{section}]\n"));
            for (variable, name) in KEY_VARIABLES {
                match std::env::var(variable) {
                    Ok(value) => text.push_str(&format!("{name} = {value}\n")),
                    Err(_) if variable == "AWS_SESSION_TOKEN" => {}
                    Err(_) => {
                        return Err(format!("the daemon has no variable {variable}; set it, and restart"));
                    }
                }
            }
            Ok(Secret::new(text.as_bytes().to_vec()))
        }
        Some(S3Keys::Instance(_) | S3Keys::Anonymous) | None => {
            Err("the configuration has no keys for the buckets; see [[http.s3]]".into())
        }
    }
}

fn read_named(path: &Path) -> Result<Secret, String> {
    read(path).map_err(|why| format!("{}: {why}", path.display()))
}

fn run_command(command: &[String], variable: (&str, &str)) -> Result<Secret, String> {
    let (program, arguments) = command.split_first().ok_or("the command is empty; name a program")?;
    execute(program, arguments, variable, COMMAND_TIME).map_err(|why| format!("{program}: {why}"))
}

fn read(path: &Path) -> Result<Secret, String> {
    read_at_most(path, LONGEST)
}

/// Reads a regular file of at most `most` bytes.
fn read_at_most(path: &Path, most: usize) -> Result<Secret, String> {
    let text = |error: io::Error| error.to_string();
    // O_NONBLOCK, so that opening a FIFO does not wait for its other end.
    let file =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(text)?;
    if !file.metadata().map_err(text)?.is_file() {
        return Err("it is not a regular file".into());
    }
    read_limited(file, most).map_err(text)?
}

/// Reads to the end. An error when that is more than `most` bytes.
fn read_limited(from: impl Read, most: usize) -> io::Result<Result<Secret, String>> {
    let mut bytes = Vec::with_capacity(most + 1);
    from.take(most as u64 + 1).read_to_end(&mut bytes)?;
    let all = bytes.len();
    let secret = Secret::new(bytes);
    Ok(if all > most { Err(format!("it is longer than {most} bytes")) } else { Ok(secret) })
}

fn execute(
    program: &str,
    arguments: &[String],
    (variable, value): (&str, &str),
    time: Duration,
) -> Result<Secret, String> {
    let end = Instant::now() + time;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", COMMAND_PATH)
        .env(variable, value)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Error messages of programs may contain secrets.
        .stderr(Stdio::null())
        // A group of its own, so that its children can be killed with it.
        .process_group(0)
        .spawn()
        .map_err(|error| error.to_string())?;
    let output = child.stdout.take().ok_or("it has no output")?;
    let (send, receive) = mpsc::channel();
    let reader = std::thread::Builder::new().name("output".into());
    let reading = reader.spawn(move || _ = send.send(read_limited(output, LONGEST)));
    let secret = match reading {
        Ok(_) => receive.recv_timeout(time).map_err(|_| format!("it takes longer than {time:?}")),
        Err(error) => Err(error.to_string()),
    };
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if secret.is_ok() && Instant::now() < end => std::thread::sleep(CHECK_INTERVAL),
            Ok(None) | Err(_) => {
                // It is not reaped yet, so the pid is still its own.
                let _ = sys::kill_group(child.id(), libc::SIGKILL);
                let _ = child.wait();
                break None;
            }
        }
    };
    let secret = secret?.map_err(|error| error.to_string())??;
    match status {
        Some(status) if status.success() => Ok(secret),
        Some(status) => Err(format!("it failed ({status})")),
        None => Err(format!("it takes longer than {time:?}")),
    }
}
