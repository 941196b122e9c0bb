//! Compares the digest of a base's source with the one that the operator gave.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use sha2::{Digest as _, Sha256, Sha512};

use super::{Check, Part, Step};
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
        let Some(expected) = &record.image.identity.digest else {
            self.without_digest += 1;
            return;
        };
        let object = format!("base {}", record.name);
        let total = record.image.identity.size;
        let note = |done| (self.watch)(Step { part: Part::Digests, done, total });
        match digest_of(&record.image.source, expected, &note) {
            Ok(found) if found == *expected => self.digests += 1,
            Ok(found) => {
                let message = format!(
                    "its source {} has the digest {}, but should have {}; put the original file back",
                    record.image.source,
                    hex(&found),
                    hex(expected)
                );
                self.find(7, object, message);
            }
            Err(e) => self.find(7, object, format!("its source {} cannot be read: {e}", record.image.source)),
        }
    }
}

/// The digest of a file, of the same kind as `like`.
fn digest_of(path: &str, like: &Digest, note: &dyn Fn(u64)) -> io::Result<Digest> {
    let file = File::options().read(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK).open(path)?;
    Ok(match like {
        Digest::Sha256(_) => Digest::Sha256(sum::<Sha256>(file, note)?.finalize().into()),
        Digest::Sha512(_) => Digest::Sha512(sum::<Sha512>(file, note)?.finalize().into()),
    })
}

fn sum<D: sha2::Digest>(mut file: File, note: &dyn Fn(u64)) -> io::Result<D> {
    let (mut sum, mut piece) = (D::new(), vec![0; PIECE]);
    let mut done = 0;
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(sum),
            Ok(n) => {
                sum.update(&piece[..n]);
                done += n as u64;
                note(done);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn hex(digest: &Digest) -> String {
    let bytes: &[u8] = match digest {
        Digest::Sha256(bytes) => bytes,
        Digest::Sha512(bytes) => bytes,
    };
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
