//! Finds the proof of a file of a new base, and checks that it is the proof of this file.
//!
//! What must hold: a proof that is found is used, or the base is refused. So an operator who sees a base with a proof
//! knows that all of its bytes are proven, and one whose proof does not fit learns it before a guest waits for it.

use std::path::Path;
use std::time::Instant;

use super::{ProofPages, beside, neighbours};
use crate::bases::Bases;
use crate::bases::origin::options_of;
use crate::bases::sources::HostSources;
use crate::format::Kind as Damage;
use crate::format::proof::{GROUP, HEADER_AREA, Hash, Layout, ProofHeader, hex};
use crate::format::record::{BaseOptions, FileProof, Strictness};
use crate::source::http::{Probed, RemoteOptions};
use crate::source::{FileSource, Location, ProofFile, Purpose, Source, SourceError, SourceErrorKind, shown};

/// Bytes of the image that are compared with the proof.
const SAMPLE: u64 = 64 << 10;

/// What an operator says of the proof of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The BLAKE3 hash that the file must have.
    pub root: Option<Hash>,
    /// Where its proof is; by default beside the image.
    pub place: Option<String>,
    /// No proof is used, whatever is beside the image.
    pub none: bool,
}

impl Wanted {
    /// What this says of the files below the image.
    pub fn of_backing(&self) -> Self {
        Self { none: self.none, ..Self::default() }
    }

    /// The hash alone, which is compared with the whole file.
    fn root_only(&self) -> Option<FileProof> {
        self.root.map(|root| FileProof { root, places: Vec::new() })
    }

    /// The header of what was found at `place` with `proof_size` bytes; none when it is no proof, and none was named.
    fn judge(
        &self,
        place: &str,
        (head, proof_size): (&[u8], u64),
        size: u64,
    ) -> Result<Option<ProofHeader>, SourceError> {
        let header = match ProofHeader::decode(head) {
            Ok(header) => header,
            // A page that a server has for every name.
            Err(error) if self.place.is_none() && matches!(error.kind, Damage::Magic | Damage::Truncated) => {
                return Ok(None);
            }
            Err(error) => return Err(unusable(place, &error.to_string())),
        };
        let wanted = Layout::of(size).proof_size();
        if header.size != size {
            let why =
                format!("it is the proof of an image of {} bytes, and this one has {size}", header.size);
            return Err(unusable(place, &why));
        }
        if proof_size != wanted {
            return Err(unusable(place, &format!("it has {proof_size} bytes, not {wanted}")));
        }
        if let Some(root) = self.root.filter(|root| *root != header.root) {
            let (found, wanted) = (hex(&header.root), hex(&root));
            let why =
                format!("it is the proof of another image: the BLAKE3 hash of that is {found}, not {wanted}");
            return Err(unusable(place, &why));
        }
        Ok(Some(header))
    }
}

fn unusable(place: &str, why: &str) -> SourceError {
    let advice =
        "publish the proof that `plyfs base seal` makes of this image, or add the base with --no-proof";
    SourceError::remote(
        SourceErrorKind::Protocol,
        "use",
        shown(place),
        format!("the proof does not fit: {why}"),
        advice,
    )
}

impl HostSources {
    /// The proof of a file of `size` bytes on web servers, which begins with `head`.
    ///
    /// # Errors
    /// `Protocol` for a proof that is not that of the file; errors of its servers, when the operator named the proof or
    /// the hash.
    pub async fn find_proof(
        &self,
        urls: &[String],
        (size, head): (u64, &[u8]),
        wanted: &Wanted,
        options: &BaseOptions,
    ) -> Result<Option<FileProof>, SourceError> {
        if wanted.none {
            return Ok(wanted.root_only());
        }
        let places: Vec<String> = match &wanted.place {
            Some(place) => vec![place.clone()],
            None => neighbours(urls).collect(),
        };
        let mut found: Option<(FileProof, Vec<u8>)> = None;
        for (place, beginning) in places.iter().zip(self.beginnings(&places, wanted, options).await?) {
            let Some((beginning, proof_size)) = beginning else { continue };
            let Some(header) = wanted.judge(place, (&beginning, proof_size), size)? else { continue };
            match &mut found {
                None => {
                    let proof = FileProof { root: header.root, places: vec![place.clone()] };
                    found = Some((proof, beginning));
                }
                Some((proof, _)) if proof.root == header.root => proof.places.push(place.clone()),
                Some((proof, _)) => {
                    let (one, other) = (hex(&proof.root), hex(&header.root));
                    let why = format!("it is the proof of {other}, and that beside another URL is of {one}");
                    return Err(unusable(place, &why));
                }
            }
        }
        let Some((proof, beginning)) = found else { return Ok(wanted.root_only()) };
        let pages = self.proof_pages(&[], size, &proof, options);
        self.try_proof(pages, &proof, &beginning, head).await?;
        Ok(Some(proof))
    }

    /// The first bytes and the size of what is at each place; none where there is nothing.
    async fn beginnings(
        &self,
        places: &[String],
        wanted: &Wanted,
        options: &BaseOptions,
    ) -> Result<Vec<Option<(Vec<u8>, u64)>>, SourceError> {
        let options = RemoteOptions { strictness: Strictness::SizeOnly, ..options_of(options) };
        let mut asked = Vec::with_capacity(places.len());
        for place in places {
            asked.push(if Location::of(place).is_url() {
                let (http, url, options) = (self.http().clone(), [place.clone()], options.clone());
                let probe = self.handle().spawn(async move { http.probe(&url, &options).await });
                Ok(probe)
            } else {
                let (opener, path) = (self.opener().clone(), place.clone());
                Err(self.handle().spawn_blocking(move || -> Result<(Vec<u8>, u64), SourceError> {
                    let file = FileSource::open_with(&*opener, Path::new(&path))?;
                    Ok((beginning(&file)?, file.size()))
                }))
            });
        }
        let mut all = Vec::with_capacity(places.len());
        for (place, asked) in places.iter().zip(asked) {
            let cancelled = || unusable(place, "the request for it was cancelled");
            let answer: Result<(Vec<u8>, u64), SourceError> = match asked {
                Ok(probe) => match probe.await.map_err(|_| cancelled())? {
                    Ok(Probed { identity, head }) => Ok((head, identity.size)),
                    Err(error) => Err(error),
                },
                Err(reading) => reading.await.map_err(|_| cancelled())?,
            };
            all.push(match answer {
                Ok(found) => Some(found),
                Err(error) if wanted.place.is_some() => return Err(error),
                // There is none.
                Err(error) if matches!(error.kind(), SourceErrorKind::Denied | SourceErrorKind::Protocol) => {
                    tracing::debug!(%error, "no proof is beside an image");
                    None
                }
                Err(error) if wanted.root.is_some() => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "whether a proof is beside an image is not known; its bytes are not proven");
                    None
                }
            });
        }
        Ok(all)
    }

    /// Proves the first bytes of the image.
    async fn try_proof(
        &self,
        pages: std::sync::Arc<ProofPages>,
        proof: &FileProof,
        beginning: &[u8],
        head: &[u8],
    ) -> Result<(), SourceError> {
        let place = proof.places.first().map_or("", String::as_str);
        if !pages.take_head(beginning) && beginning.len() as u64 > HEADER_AREA {
            return Err(unusable(place, "its hashes do not belong to the hash of the image that it names"));
        }
        let head = &head[..head.len().min(SAMPLE as usize)];
        let range = 0..head.len() as u64;
        let task =
            self.handle().spawn(async move { pages.parts(range, Purpose::Hydrate, Instant::now()).await });
        let parts = task.await.map_err(|_| unusable(place, "the request for it was cancelled"))??;
        for (offset, group) in (0..).step_by(GROUP as usize).zip(head.chunks(GROUP as usize)) {
            if !parts.prove(offset, group) {
                let (first, last) = (offset, offset + group.len() as u64 - 1);
                let why = format!(
                    "bytes {first} to {last} of the image are not those that it names, so it is of another image, or the \
                     server of the image sends wrong bytes"
                );
                return Err(unusable(place, &why));
            }
        }
        Ok(())
    }
}

fn beginning(file: &FileSource) -> Result<Vec<u8>, SourceError> {
    let mut head = vec![0; SAMPLE.min(file.size()) as usize];
    let read = file.read_at(&mut head, 0)?;
    head.truncate(read);
    Ok(head)
}

impl Bases {
    /// The proof of a file of this host. May wait for both files.
    ///
    /// # Errors
    /// `Protocol` for a proof that is not that of the file; when one of the files cannot be read.
    pub(in crate::bases) fn find_proof_file(
        &self,
        path: &str,
        wanted: &Wanted,
    ) -> Result<Option<FileProof>, SourceError> {
        if wanted.none {
            return Ok(wanted.root_only());
        }
        let place = wanted.place.clone().unwrap_or_else(|| beside(path));
        if Location::of(&place).is_url() {
            let (why, advice) = ("the proof of a file of this host is a file of this host", "give a path");
            return Err(SourceError::remote(SourceErrorKind::Protocol, "use", shown(&place), why, advice));
        }
        let opener = &**self.sources.opener();
        let proof = match FileSource::open_with(opener, Path::new(&place)) {
            Ok(proof) => proof,
            Err(error) if wanted.place.is_none() && error.kind() == SourceErrorKind::NotFound => {
                return Ok(wanted.root_only());
            }
            Err(error) => return Err(error),
        };
        let image = FileSource::open_with(opener, Path::new(path))?;
        let judged = wanted.judge(&place, (&beginning(&proof)?, proof.size()), image.size())?;
        let Some(header) = judged else { return Ok(wanted.root_only()) };
        let proof = ProofFile::open(opener, Path::new(&place), header.root, image.size())?;
        let head = beginning(&image)?;
        match proof.find_wrong(0, &head)? {
            None => Ok(Some(FileProof { root: header.root, places: vec![place] })),
            Some(wrong) => Err(unusable(&place, &format!("it is of another image: {}", wrong.why()))),
        }
    }
}
