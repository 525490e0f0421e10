package io.github.hsrpc;

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.BufferUnderflowException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Base64;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * A private key in PEM. Java reads PKCS #8 (RFC 5208) only; what OpenSSL and cert-manager write of themselves, PKCS #1
 * (RFC 8017) and SEC 1 (RFC 5915), is what PKCS #8 holds inside, and is put there.
 */
final class PrivateKeyFile {
    private static final Pattern BLOCK =
            Pattern.compile("-----BEGIN ([A-Z ]*)PRIVATE KEY-----([^-]*)-----END \\1PRIVATE KEY-----");

    private static final int OCTET_STRING = 0x04;
    private static final int SEQUENCE = 0x30;
    private static final byte[] VERSION_0 = {0x02, 1, 0};
    private static final byte[] NULL = {0x05, 0};
    /** 1.2.840.113549.1.1.1 */
    private static final byte[] RSA = {0x06, 9, 0x2a, (byte) 0x86, 0x48, (byte) 0x86, (byte) 0xf7, 0x0d, 1, 1, 1};
    /** 1.2.840.10045.2.1 */
    private static final byte[] EC = {0x06, 7, 0x2a, (byte) 0x86, 0x48, (byte) 0xce, 0x3d, 2, 1};

    private PrivateKeyFile() {}

    /**
     * Reads a file as PKCS #8, in PEM.
     *
     * @throws IllegalArgumentException if there is no key in it that can be read
     */
    static InputStream read(Path file) throws IOException {
        Matcher block = BLOCK.matcher(Files.readString(file, StandardCharsets.ISO_8859_1));
        if (!block.find()) {
            throw unusable(file, "holds no private key in PEM");
        }
        String kind = block.group(1).trim();
        if (kind.equals("ENCRYPTED") || block.group(2).contains("ENCRYPTED")) {
            throw unusable(file, "is encrypted");
        }
        try {
            byte[] key = Base64.getMimeDecoder().decode(block.group(2));
            String body = Base64.getMimeEncoder().encodeToString(pkcs8(kind, key));
            String pem = "-----BEGIN PRIVATE KEY-----\n" + body + "\n-----END PRIVATE KEY-----\n";
            return new ByteArrayInputStream(pem.getBytes(StandardCharsets.US_ASCII));
        } catch (IllegalArgumentException | BufferUnderflowException broken) {
            throw unusable(file, "is damaged, or a kind of key that is not known here");
        }
    }

    private static byte[] pkcs8(String kind, byte[] key) {
        switch (kind) {
            case "":
                return key;
            case "RSA":
                return element(SEQUENCE, VERSION_0, element(SEQUENCE, RSA, NULL), element(OCTET_STRING, key));
            case "EC":
                return element(SEQUENCE, VERSION_0, element(SEQUENCE, EC, curve(key)), element(OCTET_STRING, key));
            default:
                throw new IllegalArgumentException(kind);
        }
    }

    /** The name of its curve that a key of SEC 1 holds, behind its version and the number itself. */
    private static byte[] curve(byte[] key) {
        ByteBuffer fields = content(ByteBuffer.wrap(key));
        content(fields);
        content(fields);
        ByteBuffer curve = content(fields);
        byte[] name = new byte[curve.remaining()];
        curve.get(name);
        return name;
    }

    /** An element of DER: its tag, the length of its content, the content. */
    private static byte[] element(int tag, byte[]... parts) {
        ByteArrayOutputStream content = new ByteArrayOutputStream();
        for (byte[] part : parts) {
            content.writeBytes(part);
        }
        ByteArrayOutputStream element = new ByteArrayOutputStream();
        element.write(tag);
        element.writeBytes(length(content.size()));
        element.writeBytes(content.toByteArray());
        return element.toByteArray();
    }

    /** A length below 64 Ki, in as few bytes as hold it. */
    private static byte[] length(int length) {
        if (length < 0x80) {
            return new byte[] {(byte) length};
        }
        if (length < 0x100) {
            return new byte[] {(byte) 0x81, (byte) length};
        }
        return new byte[] {(byte) 0x82, (byte) (length >> 8), (byte) length};
    }

    /** The content of the next element of DER, which is taken. */
    private static ByteBuffer content(ByteBuffer elements) {
        elements.get();
        int length = Byte.toUnsignedInt(elements.get());
        if (length > 0x80) {
            int bytes = length - 0x80;
            length = 0;
            for (int index = 0; index < bytes; index++) {
                length = length << 8 | Byte.toUnsignedInt(elements.get());
            }
        }
        ByteBuffer content = elements.slice().limit(length);
        elements.position(elements.position() + length);
        return content;
    }

    private static IllegalArgumentException unusable(Path file, String why) {
        return new IllegalArgumentException("tlsCertificate: " + file + " " + why
                + "; give what `openssl pkcs8 -topk8 -nocrypt -in KEY -out FILE` makes of your key");
    }
}
