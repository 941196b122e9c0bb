//! The messages of NBD that a reader needs: the fixed newstyle handshake with NBD_OPT_GO, and reads with simple replies.
//! The specification is doc/proto.md of the NBD project.
//!
//! What must hold: a server may send anything. Each length that it announces has a bound here, and whatever does not fit
//! ends the connection.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::source::http::Failure;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTIONS: u64 = 0x4948_4156_454f_5054;
const OLD_STYLE: u64 = 0x0000_4202_8186_1253;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;

const FIXED: u16 = 1;
const NO_ZEROES: u16 = 2;
const OPT_GO: u32 = 7;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const READ: u16 = 0;

/// Bounds of what a server may send as one reply to an option, and of such replies.
const LONGEST_REPLY: u32 = 64 << 10;
const MOST_REPLIES: usize = 64;
/// The least bound of a block size that the specification allows a client to expect.
const LARGEST_BLOCK: u32 = 64 << 10;

/// An export that a server opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Export {
    /// Bytes.
    pub size: u64,
    /// Offsets and lengths of requests are multiples of it, a power of two.
    pub block: u32,
}

fn lost(error: &std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Failure::again("its server ended the connection"),
        _ => Failure::again(format!("the connection failed: {error}")),
    }
}

fn breach(why: impl Into<String>) -> Failure {
    Failure::Protocol(why.into())
}

async fn u64_of(stream: &mut (impl AsyncRead + Unpin)) -> Result<u64, Failure> {
    stream.read_u64().await.map_err(|error| lost(&error))
}

async fn u32_of(stream: &mut (impl AsyncRead + Unpin)) -> Result<u32, Failure> {
    stream.read_u32().await.map_err(|error| lost(&error))
}

/// Opens an export for reading.
///
/// # Errors
/// `Denied` when the server refuses, `Protocol` when it is no server that plyfs can use, `Again` when the connection
/// ends.
pub(super) async fn open(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    export: &str,
) -> Result<Export, Failure> {
    if u64_of(stream).await? != MAGIC {
        return Err(breach("it is no NBD server"));
    }
    match u64_of(stream).await? {
        OPTIONS => {}
        OLD_STYLE => {
            return Err(breach("its server has the handshake of before 2011, without names of exports"));
        }
        _ => return Err(breach("it is no NBD server")),
    }
    let flags = stream.read_u16().await.map_err(|error| lost(&error))?;
    if flags & FIXED == 0 {
        return Err(breach("its server lacks the fixed newstyle handshake"));
    }
    let mut hello = Vec::new();
    hello.extend_from_slice(&u32::from(flags & (FIXED | NO_ZEROES)).to_be_bytes());
    hello.extend_from_slice(&OPTIONS.to_be_bytes());
    hello.extend_from_slice(&OPT_GO.to_be_bytes());
    hello.extend_from_slice(&(export.len() as u32 + 8).to_be_bytes());
    hello.extend_from_slice(&(export.len() as u32).to_be_bytes());
    hello.extend_from_slice(export.as_bytes());
    hello.extend_from_slice(&1u16.to_be_bytes());
    hello.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    stream.write_all(&hello).await.map_err(|error| lost(&error))?;
    stream.flush().await.map_err(|error| lost(&error))?;
    let (mut size, mut block) = (None, 1);
    for _ in 0..MOST_REPLIES {
        let (kind, data) = option_reply(stream).await?;
        match kind {
            REP_ACK => {
                let size = size.ok_or_else(|| breach("its server does not say the size of the export"))?;
                return Ok(Export { size, block });
            }
            REP_INFO => match data.split_first_chunk::<2>() {
                Some((kind, rest)) if u16::from_be_bytes(*kind) == INFO_EXPORT => {
                    size = rest.first_chunk().map(|size| u64::from_be_bytes(*size));
                }
                Some((kind, rest)) if u16::from_be_bytes(*kind) == INFO_BLOCK_SIZE => {
                    block = rest.first_chunk().map_or(0, |least| u32::from_be_bytes(*least));
                    if !block.is_power_of_two() || block > LARGEST_BLOCK {
                        return Err(breach(format!("its server says that a block has {block} bytes")));
                    }
                }
                _ => {}
            },
            error if error & 1 << 31 != 0 => return Err(refused(error & !(1 << 31), &data)),
            _ => return Err(breach("its server answers the option with an unknown reply")),
        }
    }
    Err(breach("its server answers the option without end"))
}

async fn option_reply(stream: &mut (impl AsyncRead + Unpin)) -> Result<(u32, Vec<u8>), Failure> {
    if u64_of(stream).await? != OPTION_REPLY {
        return Err(breach("its server does not answer the option"));
    }
    if u32_of(stream).await? != OPT_GO {
        return Err(breach("its server answers another option"));
    }
    let (kind, length) = (u32_of(stream).await?, u32_of(stream).await?);
    if length > LONGEST_REPLY {
        return Err(breach(format!("its server answers the option with {length} bytes")));
    }
    let mut data = vec![0; length as usize];
    stream.read_exact(&mut data).await.map_err(|error| lost(&error))?;
    Ok((kind, data))
}

/// The failure of an error reply; `text` is the server's own word.
fn refused(error: u32, text: &[u8]) -> Failure {
    let said = String::from_utf8_lossy(text);
    let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
    let said = if said.is_empty() { said } else { format!(" ({said})") };
    let denied =
        |why: &str, advice| Failure::Denied { status: 0, why: format!("{why}{said}"), advice: Some(advice) };
    match error {
        1 => breach(format!("its server lacks NBD_OPT_GO, of 2017{said}")),
        2 => denied("its server does not allow it", "look at the permissions of the server"),
        5 => {
            denied("its server demands TLS, which plyfs does not speak with NBD", "use a tunnel or a socket")
        }
        6 => denied("its server has no such export", "check the name; list them with: nbdinfo --list URL"),
        7 => Failure::again(format!("its server is shutting down{said}")),
        _ => denied("its server refuses it", "look at the log of the server"),
    }
}

/// A request to read.
pub(super) fn read(cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST.to_be_bytes());
    bytes[6..8].copy_from_slice(&READ.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// The head of the next reply: its cookie, and the error number or 0. With 0 the data follows.
pub(super) async fn reply(stream: &mut (impl AsyncRead + Unpin)) -> Result<(u64, u32), Failure> {
    match u32_of(stream).await? {
        REPLY => {}
        STRUCTURED_REPLY => return Err(breach("its server sends structured replies without being asked")),
        _ => return Err(breach("its server sends what is no reply")),
    }
    let error = u32_of(stream).await?;
    Ok((u64_of(stream).await?, error))
}

/// Fills a buffer with the data of a reply.
pub(super) async fn data(stream: &mut (impl AsyncRead + Unpin), buf: &mut [u8]) -> Result<(), Failure> {
    stream.read_exact(buf).await.map(drop).map_err(|error| lost(&error))
}

/// The words for an error number of the protocol.
pub(super) fn error_text(error: u32) -> String {
    let name = match error {
        1 => "EPERM",
        5 => "EIO",
        12 => "ENOMEM",
        22 => "EINVAL",
        28 => "ENOSPC",
        75 => "EOVERFLOW",
        95 => "ENOTSUP",
        108 => "ESHUTDOWN",
        _ => return format!("its server answers a read with error {error}"),
    };
    format!("its server answers a read with {name}")
}
