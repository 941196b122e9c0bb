//! Compares the digest of a base's source with the one that the operator gave.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use sha2::{Digest as _, Sha256, Sha512};

use super::{Check, Part, Step};
use crate::format::proof::Hash;
use crate::format::record::{BaseRecord, Digest};

/// Bytes of one read.
const PIECE: usize = 1 << 20;

/// Whether the check compares the digests of bases, which reads each base as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyBases {
    /// It compares only size, modification time and inode.
    No,
    /// It also compares the digest of each base that has one.
    Yes,
}

impl Check<'_> {
    /// The part of invariant 7 that is checked on request. The metadata of the source have been checked.
    pub(super) fn verify_digest(&mut self, record: &BaseRecord) {
        let image = &record.image;
        let expected = [
            image.identity.digest.clone().map(Expected::Sha),
            image.proof.as_ref().map(|proof| Expected::Blake3(proof.root)),
        ];
        let expected: Vec<Expected> = expected.into_iter().flatten().collect();
        if expected.is_empty() {
            self.without_digest += 1;
            return;
        }
        let object = format!("base {}", record.name);
        let total = image.identity.size;
        let watch = self.watch;
        let note = |done| watch(Step { part: Part::Digests, done, total });
        let mut right = true;
        for expected in expected {
            let found = digest_of(&image.source, &expected, &note);
            right &= found.as_ref().is_ok_and(|found| *found == expected);
            match found {
                Ok(found) if found == expected => {}
                Ok(found) => {
                    let (found, expected) = (hex(&found), hex(&expected));
                    let message = format!(
                        "its source {} has the digest {found}, but should have {expected}; put the original file back",
                        image.source
                    );
                    self.find(7, object.clone(), message);
                }
                Err(e) => {
                    self.find(7, object.clone(), format!("its source {} cannot be read: {e}", image.source));
                }
            }
        }
        self.digests += u64::from(right);
    }
}

/// A digest that a base was registered with.
#[derive(PartialEq, Eq)]
enum Expected {
    Sha(Digest),
    /// The root of a proof.
    Blake3(Hash),
}

/// The digest of a file, of the same kind as `like`.
fn digest_of(path: &str, like: &Expected, note: &dyn Fn(u64)) -> io::Result<Expected> {
    let file = File::options().read(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK).open(path)?;
    Ok(match like {
        Expected::Sha(Digest::Sha256(_)) => Expected::Sha(Digest::Sha256(
            sum(file, note, Sha256::new(), |sum, b| sum.update(b))?.finalize().into(),
        )),
        Expected::Sha(Digest::Sha512(_)) => Expected::Sha(Digest::Sha512(
            sum(file, note, Sha512::new(), |sum, b| sum.update(b))?.finalize().into(),
        )),
        Expected::Blake3(_) => {
            let add = |sum: &mut blake3::Hasher, bytes: &[u8]| {
                sum.update(bytes);
            };
            Expected::Blake3(*sum(file, note, blake3::Hasher::new(), add)?.finalize().as_bytes())
        }
    })
}

fn sum<S>(mut file: File, note: &dyn Fn(u64), mut sum: S, add: impl Fn(&mut S, &[u8])) -> io::Result<S> {
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(sum),
            Ok(n) => {
                add(&mut sum, &piece[..n]);
                done += n as u64;
                note(done);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn hex(digest: &Expected) -> String {
    let bytes: &[u8] = match digest {
        Expected::Sha(Digest::Sha256(bytes)) | Expected::Blake3(bytes) => bytes,
        Expected::Sha(Digest::Sha512(bytes)) => bytes,
    };
    hex::encode(bytes)
}
