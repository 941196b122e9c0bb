use super::{Kind, Secret, basic, covers, headers};
use reqwest::Url;

#[test]
fn a_user_and_a_password_are_one_header_line() {
    // The example of RFC 7617.
    assert_eq!(*basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
    assert_eq!(*basic("test", "123\u{a3}"), "Basic dGVzdDoxMjPCow==");
    assert_eq!(*basic("", ""), "Basic Og==");
}

#[test]
fn a_scope_covers_whole_segments_of_a_path() {
    for (scope, url, inside) in [
        ("https://h/", "https://h/a/b?c", true),
        ("https://h", "https://h/a", true),
        ("https://h/a", "https://h/a", true),
        ("https://h/a", "https://h/a/b", true),
        ("https://h/a", "https://h/ab", false),
        ("https://h/a/", "https://h/a/b", true),
        ("https://h/a/", "https://h/a", false),
        ("https://h/a/", "https://h/a/../b", false),
        ("https://h/a/", "https://h/a/%2e%2e/b", false),
        ("https://h/a/", "https://h/a/..%2Fb", false),
        ("https://h/a/", "https://h/a/%2e%2e%2fb", false),
        ("https://h/a/", "https://h/a/.%2E%2Fb", false),
        ("https://h/a/", "https://h/a/c%2f..", false),
        ("https://h/a/", "https://h/a/..%5Cb", false),
        ("https://h/a/", "https://h/a/b..%2fc", true),
        ("https://h/", "http://h/", false),
        ("https://h/", "https://h:8443/", false),
        ("https://h:443/", "https://h/", true),
        ("https://h/", "https://hh/", false),
        ("https://h/", "https://h.evil.example/", false),
        ("https://H/", "https://h/", true),
    ] {
        let parse = |text| Url::parse(text).unwrap();
        assert_eq!(covers(&parse(scope), &parse(url)), inside, "{scope} {url}");
    }
}

#[test]
fn credentials_of_a_wrong_form_are_refused_without_being_shown() {
    let lines = |kind, text: &str| {
        headers(kind, &Secret::new(text.into())).map(|headers| {
            let line = |(name, value): (&_, &reqwest::header::HeaderValue)| {
                assert!(value.is_sensitive());
                format!("{name}: {}", value.to_str().unwrap())
            };
            headers.iter().map(line).collect::<Vec<_>>()
        })
    };
    assert_eq!(lines(Kind::Bearer, " abc\n").unwrap(), ["authorization: Bearer abc"]);
    assert_eq!(
        lines(Kind::Basic, "Aladdin:open sesame\n").unwrap(),
        ["authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="]
    );
    assert_eq!(lines(Kind::Either, "eyJ0.a-b_c==\n").unwrap(), ["authorization: Bearer eyJ0.a-b_c=="]);
    assert_eq!(lines(Kind::Either, "X-Auth-Token: 5\n\nX-More:6").unwrap(), ["x-auth-token: 5", "x-more: 6"]);
    for (kind, text) in [
        (Kind::Bearer, ""),
        (Kind::Bearer, "a\nb"),
        (Kind::Bearer, "a\u{1}b"),
        (Kind::Basic, "nobody"),
        (Kind::Headers, "token"),
        (Kind::Headers, "Range: bytes=0-1"),
        (Kind::Headers, "Host: other"),
        (Kind::Headers, "a b: c"),
        (Kind::Either, "two words"),
    ] {
        let why = lines(kind, text).expect_err(text);
        assert!(text.is_empty() || !why.contains(text), "{why}");
    }
    assert_eq!(format!("{:?}", Secret::new("hidden".into())), "Secret(..)");
}
