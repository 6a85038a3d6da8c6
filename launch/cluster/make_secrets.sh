#!/bin/sh
# Makes what servers and trainer show one another: a token, an authority, and certificates signed by it.
#
#     launch/cluster/make_secrets.sh FOLDER NAME...     # a NAME as the trainer writes it; *.a.b holds for x.a.b
#
# FOLDER/server and FOLDER/client hold token, ca.pem, cert.pem and key.pem: make a Secret of each. FOLDER/ca.key signs
# more certificates and stays with you. A server's certificate holds for localhost too, and may ask a server for its
# health. They end after DAYS [365]. To renew, run it with a new folder, replace both Secrets and start all parts anew.
set -eu
umask 077

if [ $# -lt 2 ]; then
    echo "usage: $0 FOLDER NAME...   such as: $0 secrets '*.rl.tapojax.svc'" >&2
    exit 2
fi
if [ -e "$1" ]; then
    echo "error: $1 exists: name a new folder, or delete it if nothing uses its secrets" >&2
    exit 1
fi
folder=$1
shift
names="DNS:localhost,IP:127.0.0.1"
for name in "$@"; do names="$names,DNS:$name"; done

quietly() {
    said=$("$@" 2>&1) || { echo "error: $said" >&2 && exit 1; }
}
certificate() { # PATH EXTENSIONS SIGNING-OPTION...: makes PATH.pem and PATH.key
    path=$1
    printf 'subjectKeyIdentifier=hash\n%b\n' "$2" >"$path.ext"
    shift 2
    quietly openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
        -subj "/O=tapojax/CN=$(basename "$path")" -keyout "$path.key" -out "$path.csr"
    quietly openssl x509 -req -sha256 -days "${DAYS:-365}" -in "$path.csr" -extfile "$path.ext" -out "$path.pem" "$@"
    rm "$path.ext" "$path.csr"
}

mkdir -p "$folder/server" "$folder/client"
cd "$folder"
certificate ca "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign" -signkey ca.key
leaf="basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nauthorityKeyIdentifier=keyid"
certificate server/server "$leaf\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=$names" \
    -CA ca.pem -CAkey ca.key -CAcreateserial
certificate client/client "$leaf\nextendedKeyUsage=clientAuth" -CA ca.pem -CAkey ca.key -CAcreateserial
openssl rand -hex 32 >server/token
for side in server client; do
    mv "$side/$side.pem" "$side/cert.pem"
    mv "$side/$side.key" "$side/key.pem"
    cp ca.pem "$side/ca.pem"
done
cp server/token client/token
rm -f ca.srl
echo "$folder: server/ and client/ with token, ca.pem, cert.pem, key.pem for $*"
