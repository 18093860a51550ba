//! HTTP/1.1 as a scoring server needs it: one request after another on a connection, bodies of a stated length.

use std::io::{ErrorKind, Read, Result as IoResult, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::Refusal;

/// The longest head of a request, in bytes, and its most headers.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
/// How long a client may take between two bytes, in either direction.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a connection may stay open without a request, and where others wait for its place.
const IDLE: Duration = Duration::from_secs(60);
const CROWDED: Duration = Duration::from_secs(1);
/// How often a connection without a request looks whether the server stops.
const LOOK: Duration = Duration::from_millis(100);

/// The head of a request.
pub(super) struct Head {
    pub(super) method: String,
    /// Without the query.
    pub(super) path: String,
    /// Bytes of the body.
    pub(super) length: usize,
    /// Whether another request may follow.
    pub(super) keep: bool,
    /// Whether the client waits to be told to send the body.
    expects: bool,
}

/// A connection, and what was read of it but not used.
pub(super) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// What comes next on a connection.
pub(super) enum Next {
    Request(Head),
    /// Something that is no request, to be answered and then closed.
    Bad(Refusal),
    /// The end: the client left, said nothing for long, or the server stops.
    End,
}

impl Connection {
    pub(super) fn new(stream: TcpStream) -> IoResult<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(SILENCE))?;
        Ok(Self { stream, buffer: vec![] })
    }

    /// Waits for the head of a request, for less time where the server is `crowded`, and not at all once it `stops`.
    pub(super) fn next(&mut self, stops: impl Fn() -> bool, crowded: impl Fn() -> bool) -> IoResult<Next> {
        let start = Instant::now();
        loop {
            if !self.buffer.is_empty() {
                match head(&self.buffer) {
                    Ok(Some((used, head))) => {
                        self.buffer.drain(..used);
                        return Ok(Next::Request(head));
                    }
                    Ok(None) => {}
                    Err(refusal) => return Ok(Next::Bad(refusal)),
                }
                self.stream.set_read_timeout(Some(SILENCE))?;
            } else if stops() || start.elapsed() > if crowded() { CROWDED } else { IDLE } {
                return Ok(Next::End);
            } else {
                self.stream.set_read_timeout(Some(LOOK))?;
            }
            let mut more = [0; 4096];
            match self.stream.read(&mut more) {
                Ok(0) => return Ok(Next::End),
                Ok(read) => self.buffer.extend(&more[..read]),
                Err(e) if waits(&e) && self.buffer.is_empty() => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Reads the body that a head announced.
    pub(super) fn body(&mut self, head: &Head) -> IoResult<Vec<u8>> {
        if head.expects && self.buffer.is_empty() {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        self.stream.set_read_timeout(Some(SILENCE))?;
        let here = self.buffer.len().min(head.length);
        let mut body: Vec<u8> = self.buffer.drain(..here).collect();
        (&mut self.stream).take((head.length - here) as u64).read_to_end(&mut body)?;
        if body.len() < head.length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(body)
    }

    /// Answers with JSON.
    pub(super) fn answer(&mut self, status: u16, extra: &str, keep: bool, body: &[u8]) -> IoResult<()> {
        let connection = if keep { "keep-alive" } else { "close" };
        let reason = reason(status);
        let head = format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: {connection}\r\n{extra}\r\n",
            body.len()
        );
        let whole = [head.as_bytes(), body].concat();
        self.stream.write_all(&whole)
    }

    /// Answers what is no request, and takes in what the client still sends, so that it can read the answer.
    pub(super) fn refuse(&mut self, refusal: &Refusal) -> IoResult<()> {
        self.answer(refusal.status, "", false, &refusal.body())?;
        self.stream.shutdown(std::net::Shutdown::Write)?;
        self.stream.set_read_timeout(Some(LOOK))?;
        let mut rest = [0; 1 << 16];
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) && matches!(self.stream.read(&mut rest), Ok(1..)) {}
        Ok(())
    }

    /// Whether the client has left. Does not wait.
    pub(super) fn is_gone(&self) -> bool {
        if !self.buffer.is_empty() || self.stream.set_nonblocking(true).is_err() {
            return false;
        }
        let seen = self.stream.peek(&mut [0]);
        let back = self.stream.set_nonblocking(false);
        back.is_err() || matches!(&seen, Ok(0)) || seen.is_err_and(|e| !waits(&e))
    }
}

fn waits(e: &std::io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// The head at the beginning of `bytes`, and its length; none where more is to come.
fn head(bytes: &[u8]) -> Result<Option<(usize, Head)>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let used = match request.parse(bytes) {
        Ok(httparse::Status::Complete(used)) if used <= MAX_HEAD => used,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(None),
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            let message = format!("expected a head of at most {MAX_HEAD} bytes and {MAX_HEADERS} headers");
            return Err(Refusal::new(431, None, message));
        }
        Err(e) => return Err(Refusal::new(400, None, format!("expected an HTTP request: {e}"))),
    };
    let header = |name: &str| {
        let found = request.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name));
        found.map(|h| String::from_utf8_lossy(h.value).trim().to_ascii_lowercase()).collect::<Vec<_>>()
    };
    if !header("transfer-encoding").is_empty() {
        return Err(Refusal::new(411, None, "expected a Content-Length, got a Transfer-Encoding"));
    }
    let lengths = header("content-length");
    // Digits alone: what is read otherwise, `+5` say, another reader of the same bytes may read differently.
    let length = match lengths.as_slice() {
        [] => Some(0),
        [one] if !one.is_empty() && one.bytes().all(|b| b.is_ascii_digit()) => one.parse().ok(),
        _ => None,
    };
    let length = length.ok_or_else(|| Refusal::new(400, None, format!("expected one Content-Length, got {lengths:?}")))?;
    let connection = header("connection").join(",");
    let says = |word: &str| connection.split(',').any(|w| w.trim() == word);
    let path = request.path.unwrap_or_default().split('?').next().unwrap_or_default();
    let head = Head {
        method: request.method.unwrap_or_default().into(),
        path: path.into(),
        length,
        keep: if request.version == Some(1) { !says("close") } else { says("keep-alive") },
        expects: header("expect").iter().any(|e| e == "100-continue"),
    };
    Ok(Some((used, head)))
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads() {
        let read =
            |text: &str| head(text.as_bytes()).map(|found| found.map(|(used, h)| (used, h.method, h.path, h.length, h.keep)));
        let whole = "POST /v1/completions?x=1 HTTP/1.1\r\ncontent-length: 12\r\n\r\nbody";
        assert_eq!(read(whole).unwrap(), Some((whole.len() - 4, "POST".into(), "/v1/completions".into(), 12, true)));
        assert_eq!(read(&whole[..whole.len() - 6]).unwrap(), None);
        assert!(!read("GET / HTTP/1.0\r\n\r\n").unwrap().unwrap().4);
        assert!(!read("GET / HTTP/1.1\r\nConnection: x, Close\r\n\r\n").unwrap().unwrap().4);
        assert!(read("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").unwrap().unwrap().4);
        for (text, status) in [
            ("hello\r\n\r\n", 400),
            ("GET /\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        ] {
            assert_eq!(read(text).unwrap_err().status, status, "{text:?}");
        }
        assert_eq!(read(&format!("GET /{} HTTP/1.1\r\n", "a".repeat(MAX_HEAD))).unwrap_err().status, 431);
        assert_eq!(read(&format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1))).unwrap_err().status, 431);
    }
}
